"""All that is printed and raised stands in one file, so that a changed message is read as a sentence."""

from pathlib import Path

from tests.messages import FILE, all_messages, messages


def test_the_messages_are_those_that_were_read() -> None:
    assert all_messages() == FILE.read_text(), "read the new messages, then: python -m tests.messages"


def test_literals_with_values_are_found_wherever_they_are_raised_or_printed(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        'raise UserError(f"{path}: not here " + "at all")\n'
        'log.warning("of %s: %s", a, b)\n'
        'Finding("problem", "nodes", "does not answer")\n'
        'say("one\\ntwo three")\n'
        'other("not a message")\n'
        "say(text)\n"
    )
    assert list(messages(file)) == ["{path}: not here at all", "of %s: %s", "does not answer", "one\\ntwo three"]
