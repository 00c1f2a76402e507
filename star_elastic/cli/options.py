"""Arguments and options of several commands: one meaning and one help text each."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from star_elastic.bundled import find_model

Elastic = Annotated[
    Path, Argument(parser=find_model, help="Elastic checkpoint directory, or bundled.")
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Dtype = Annotated[
    str, Option(help="float32, bfloat16, float16, or auto: what the weights are stored in.")
]
