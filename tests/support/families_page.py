"""The tables of docs/families.md, from the code: `python tests/support/families_page.py docs/families.md` writes them."""

import re
import sys
from pathlib import Path

from tiny_models import FAMILIES, NF4_FAMILIES, OTHER_FAMILIES, family_config

from early_exit_cli.backbone.families import ASSISTANTS, WRAPPERS
from early_exit_cli.backbone.families import FAMILIES as SUPPORTED

MODEL_TYPES = {name: family_config(name).model_type for name in (*FAMILIES, *OTHER_FAMILIES)}


def shapes_of(model_type):
    """The tiny models of a family, by their names in `tiny_models.py`."""
    return [name for name, found in MODEL_TYPES.items() if found == model_type]


def own_drafter(name):
    """What a model of the family may bring to draft with."""
    return "MTP layer" if SUPPORTED[name].mtp else "assistant" if name in ASSISTANTS.values() else ""


def tables() -> dict[str, str]:
    """Each table by its first column."""
    families = [
        "| family | models | runner | its own drafter | tiny models in the suite | in 4 bit too |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{name}` | {family.models} | {family.runner} | {own_drafter(name)} | {', '.join(shapes_of(name))} | "
            f"{'yes' if name in {MODEL_TYPES[shape] for shape in NF4_FAMILIES} else ''} |"
            for name, family in SUPPORTED.items()
        ),
    ]
    wholes = [
        "| checkpoint | models |",
        "|---|---|",
        *(f"| `{name}` | {models} |" for name, models in WRAPPERS.items()),
    ]
    return {"family": "\n".join(families), "checkpoint": "\n".join(wholes)}


def with_tables(page: str) -> str:
    """A page with its tables as the code has them."""
    for first, table in tables().items():
        page = re.sub(rf"^\| {first} \|.*?(?=\n\n)", lambda _, table=table: table, page, flags=re.DOTALL | re.MULTILINE)
    return page


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.write_text(with_tables(place.read_text()))
