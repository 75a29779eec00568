"""docs/commands is what the settings say: nothing missing, nothing stale."""

from pathlib import Path

from early_exit_cli.cli.reference import commands, file_name, page

FOLDER = Path(__file__).parents[2] / "docs" / "commands"


def test_every_command_has_its_page_and_it_is_current():
    made = {file_name(name): page(name, help, function) for name, help, function in commands()}
    assert {path.name for path in FOLDER.glob("*.md")} == set(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, f"{name} is stale: make docs"


def test_a_page_names_every_setting_of_its_command():
    from early_exit_cli.resolve import sections

    for name, help, function in commands():
        text = page(name, help, function)
        for section in function.sections:
            for field in sections()[section].model_fields:
                assert f"`--{field.replace('_', '-')}`" in text, (name, field)
