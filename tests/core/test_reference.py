import pytest

from serve_app.core.catalog import ModelEntry
from serve_app.core.reference import Reference, hub_parts, is_reference, package_parts, parse_reference
from serve_app.core.task import TaskSpec


def test_path_is_a_file_with_or_without_saying_so() -> None:
    assert parse_reference("models/a.pth") == parse_reference("file:models/a.pth")
    assert parse_reference("models/a.pth") == Reference(kind="file", place="models/a.pth")
    assert not is_reference("models/a.pth")


def test_digest_is_no_part_of_the_place() -> None:
    assert parse_reference("file:a.pth#sha256=B0353104") == Reference(kind="file", place="a.pth", sha256="b0353104")
    assert parse_reference("https://host/a.pth#sha256=b0353104").place == "https://host/a.pth"


def test_package_may_have_a_version() -> None:
    assert package_parts(parse_reference("package:some-weights==1.0.1/some_weights/a.pth")) == (
        "some-weights==1.0.1",
        "some_weights/a.pth",
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://org/repo/model.safetensors", ("org/repo", None, "model.safetensors")),
        ("hf://org/repo@v1.0/onnx/model.onnx", ("org/repo", "v1.0", "onnx/model.onnx")),
        ("hf://org/repo", ("org/repo", None, "")),
    ],
)
def test_hub_reference_names_repository_revision_and_file(text: str, parts: tuple[str, str | None, str]) -> None:
    assert hub_parts(parse_reference(text)) == parts


@pytest.mark.parametrize(
    "text",
    [
        "package:some-weights",
        "package:some-weights/../../etc/passwd",
        "package:--index-url=http://host/a.pth",
        "hf://repo",
        "hf://org/repo/../../a",
        "s3://bucket",
        "https:///a.pth",
        "file:",
        "file:a.pth#sha256=1234",
        "https://host/a.pth#sha256=not-hexadecimal",
    ],
)
def test_what_names_nothing_is_refused_when_the_catalog_is_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"must|names no file"):
        parse_reference(text)
    with pytest.raises(ValueError, match=r"must|names no file"):
        ModelEntry(model_id="m", builder="torchvision:resnet18", weights=text)
    with pytest.raises(ValueError, match=r"must|names no file"):
        ModelEntry(model_id="m", builder="onnx:m.onnx", task=TaskSpec(kind="embedding", tokenizer=text))


def test_weights_that_are_no_reference_are_refused_with_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"weights 'ftp://host/a' must be pretrained, random:SEED, file:PATH, package:"
    ):
        ModelEntry(model_id="m", builder="torchvision:resnet18", weights="ftp://host/a")
