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
    for name, help, function in commands():
        text = page(name, help, function)
        for fields in function.settings.values():
            for field in fields:
                assert f"`--{field.replace('_', '-')}`" in text, (name, field)


def test_an_assistant_is_named_only_where_it_drafts():
    takes = {name for name, _, function in commands() if "assistant" in function.settings.get("backbone", ())}
    assert takes == {"infer", "chat", "serve", "bench", "calibrate"}
