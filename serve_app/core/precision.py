"""What models compute in, and the names of the forms that follow from it."""

from __future__ import annotations

from typing import Literal

#: What a model is published in; its tensors have the datatypes of its contract all the same.
Dtype = Literal["float32", "bfloat16"]

#: What a form of a model computes in.
Precision = Literal["float32", "bfloat16", "int8"]

#: Which compiled forms of lower precision a model may have besides those of the precision that it is published in:
#: ``auto``: those that agree with it; ``int8``: one that does, which then serves it.
Lowered = Literal["no", "auto", "int8"]

#: The share of probes on which a form of lower precision must agree with float32.
AGREEMENT = 0.99


def precisions(dtype: Dtype, lowered: Lowered) -> tuple[Precision, ...]:
    """Return the precisions that compiled forms may have; the lower ones as far as they agree with float32."""
    match lowered:
        case "auto":
            return ("float32", "bfloat16", "int8")
        case "int8":
            return ("float32", "int8")
        case "no":
            return (dtype,)


def problem_of(lowered: Lowered, dtype: Dtype, runtime: str, builder: str) -> str | None:
    """Return why a catalog entry cannot have forms of lower precision; None if it can, or has none."""
    if lowered == "no":
        return None
    if dtype != "float32":
        return f"what is published in {dtype} has no forms of lower precision"
    if runtime != "auto":
        return f"precision: {lowered} chooses among runtimes; leave runtime: {runtime} out"
    if lowered == "int8" and builder.startswith("onnx:"):
        return "precision: int8 is for modules; quantize the ONNX file itself, and leave precision out"
    return None


def form_name(runtime: str, precision: str) -> str:
    """Return the name of a form: ``mapped``, or the library that it is compiled for, and what it computes in.

    The latter is left out where it is float32: ``mapped``, ``openvino``, ``openvino-bfloat16``, ``onnxruntime-int8``.
    """
    name = "mapped" if runtime == "torch" else runtime
    return name if precision == "float32" else f"{name}-{precision}"


def parts_of_form(form: str) -> tuple[str, str]:
    """Return how a form is in memory, and what it computes in: ``openvino`` and ``bfloat16``."""
    name, _, precision = form.partition("-")
    return name, precision or "float32"
