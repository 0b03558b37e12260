"""A finding: what was looked at, what was seen, and what to do about it."""

import dataclasses

OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    `state` is "ok", "note" for what costs speed or a feature, or "wrong" for what a training would
    fail of. All but the first have a `remedy`, a command or a setting. `facts` are the figures
    behind the text, for programs.
    """

    topic: str
    text: str
    state: str = OK
    remedy: str = ""
    facts: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        assert self.state == OK or self.remedy, self.text
