"""``edgeserve infer``: sends a file to a model, and prints or draws its answer, whatever the task of the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve_app.cli.client import request, server_options
from serve_app.cli.console import check_writable, stdout, warn, writing

#: Content types by the ending of a file; of others the model sees whether it can read them.
_CONTENT_TYPES = {
    ".txt": "text/plain",
    ".md": "text/plain",
    ".json": "application/json",
    ".wav": "audio/wav",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}
_ANY = "application/octet-stream"

#: Numbers of a vector or tensor that are printed.
_SHOWN = 8


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@server_options
@click.option("--location", help="Ask this location.")
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(1, 1000), help="How many labels.")
@click.option("--min-score", type=click.FloatRange(0, 1), help="Leave out detections that score less.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Draw boxes or masks into a copy.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def infer(
    model: str,
    file: Path,
    url: str,
    token: str | None,
    location: str | None,
    top_k: int,
    min_score: float | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Send FILE to MODEL, a model or a family, and print the answer.

    FILE is what the task of the model takes: an image, a text, a WAV file, JSON, or any file; - is the standard input.
    """
    if output is not None:
        check_writable("--output", output)
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    headers = {"Content-Type": _CONTENT_TYPES.get(file.suffix.lower(), _ANY)}
    if location is not None:
        headers["X-Edge-Location"] = location
    params = {"model": model, "top_k": str(top_k)}
    if min_score is not None:
        params["min_score"] = str(min_score)
    answer = request("POST", f"{url}/v1/predict", token, params=params, content=data, headers=headers)
    if output is not None:
        _draw(data, answer, output)
    if as_json:
        click.echo(json.dumps(answer))
        return
    out = stdout()
    print_answer(answer, out)
    timing = ", ".join(f"{name} {ms:.1f} ms" for name, ms in answer["timing_ms"].items() if ms)
    out.print(f"[dim]{answer['model']} at {answer['location']}: {answer['outcome']} ({timing})[/]")
    if "warning" in answer:
        warn(answer["warning"])


def print_answer(answer: dict[str, Any], out: Console) -> None:
    """Print what a model has answered, by the fields that the answer has."""
    for best in answer.get("predictions", ()):
        out.print(f"{best['probability']:7.2%}  {best['label']}", markup=False)
    if "detections" in answer:
        _print_detections(answer, out)
    for found in answer.get("classes", ()):
        out.print(f"{found['share']:7.2%}  {found['label']}", markup=False)
    if "speech" in answer:
        _print_speech(answer, out)
    for vector in answer.get("embeddings", ()):
        out.print(f"{len(vector)} dimensions: {_numbers(vector)}", markup=False)
    for name, values in answer.get("outputs", {}).items():
        out.print(f"{name}: {json.dumps(values)}", markup=False)
    if "labels" in answer:
        out.print(f"labels: {', '.join(answer['labels'])}", markup=False)


def _print_detections(answer: dict[str, Any], out: Console) -> None:
    if not answer["detections"]:
        out.print("nothing is detected")
        return
    table = Table(box=None, header_style="bold")
    table.add_column("score", justify="right")
    table.add_column("label")
    for side in ("left", "top", "right", "bottom"):
        table.add_column(side, justify="right")
    for found in answer["detections"]:
        table.add_row(f"{found['score']:.2f}", escape(found["label"]), *(f"{side:.0f}" for side in found["box"]))
    out.print(table)


def _print_speech(answer: dict[str, Any], out: Console) -> None:
    for segment in answer["speech"]:
        out.print(f"{segment['start_s']:8.2f} s to {segment['end_s']:8.2f} s")
    out.print(
        f"speech in {answer['speech_share']:.1%} of {answer['duration_s']:.2f} s, largest probability "
        f"{answer['probability']['largest']:.3f}"
    )


def _numbers(vector: list[float]) -> str:
    shown = " ".join(f"{value:.4f}" for value in vector[:_SHOWN])
    return f"{shown} ..." if len(vector) > _SHOWN else shown


def _draw(data: bytes, answer: dict[str, Any], output: Path) -> None:
    # Pillow is imported only where something is drawn.
    from serve_app.cli.drawing import draw

    picture = draw(data, answer)
    with writing(output):
        picture.save(output)
