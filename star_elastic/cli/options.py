"""Arguments and options of several commands: one meaning and one help text each."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from star_elastic.bundled import find_model
from star_elastic.strict import MOST_ROWS

Elastic = Annotated[
    Path, Argument(parser=find_model, help="Elastic checkpoint directory, or bundled.")
]
Model = Annotated[
    Path, Argument(parser=find_model, help="Checkpoint directory or config.json; bundled-parent.")
]
Batch = Annotated[int, Option(help="Sequences held at once.", min=1, max=MOST_ROWS)]
DtypeBytes = Annotated[
    int, Option(help="Bytes per parameter and per element of KV and conv states.", min=1, max=16)
]
SsmDtypeBytes = Annotated[
    int, Option(help="Bytes per element of the SSM state (transformers: 4).", min=1, max=16)
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Dtype = Annotated[
    str, Option(help="float32, bfloat16, float16, or auto: what the weights are stored in.")
]
