"""A run that is being described: the fields of the form, and the commands that they mean.

The fields are in the address of each step, so that a reloaded page, or a link to it, shows the same.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, is_dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlencode

from backhand.bounds import Bound, Count, check_value, hints_of, split_hint, union_members
from backhand.cli.commands import COMMANDS
from backhand.cli.option_fields import OptionField, option_fields
from backhand.data.options import LintRunOptions, columns_named
from backhand.errors import UsageError
from backhand.nn.model_options import is_hub_id
from backhand.objective.page import Page, Role
from backhand.objective.registry import names, objectives, part, recorded_traits
from backhand.objective.spec import Traits
from backhand.options.config import TrainConfig
from backhand.options.objectives import objectives_with
from backhand.studio.workspace import Workspace
from backhand.words import nearest_names


def pages() -> dict[str, Page]:
    """Return the objectives that the page offers, by name."""
    return {spec.name: part(spec.page) for spec in objectives() if spec.page}


def offered(objective: str) -> Page:
    """Return an objective on the page; no objective yet is the first one."""
    known = pages()
    return known.get(objective) or next(iter(known.values()))


def roles_of() -> dict[str, tuple[Role, ...]]:
    """Return columns by the names of the objectives that have the same ones."""
    names: dict[tuple[Role, ...], str] = {}
    for name, page in pages().items():
        if page.roles:
            names[page.roles] = f"{names.get(page.roles, '')} {name}".strip()
    return {joined: roles for roles, joined in names.items()}


_LABELS = {
    "eval_fraction": "the share of held-out rows under “What to learn”",
    "reward_length": "the length of answers",
}
"""Names of numbers outside "more"."""
MORE = {
    "adapter": (
        *("rank", "alpha", "dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules"),
        *("layers", "modules_to_save", "lora_bias"),
    ),
    "optimization": (
        *("epochs", "max_steps", "learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("batch_rows", "micro_batch_rows", "average_share"),
    ),
    "data": ("max_length", "long_rows", "skip_bad", "train_on", "system", "option_order", "option_rows"),
    "run": ("eval_every", "save_every", "keep", "early_stopping", "max_forgetting", "answers", "seed"),
    "model": ("dtype", "engine", "base", "memory", "recompute", "cache_frozen"),
    "rewards": ("group", "max_new_tokens", "temperature"),
    "objective": (
        *("beta", "loss_type", "label_smoothing", "pooling", "query_prompt", "document_prompt"),
        *("problem_type", "ranking_loss"),
    ),
}
"""Options under "more", by section. None of them names a file or code."""

PACKAGED = ("smollm2-135m", "all-minilm-l6-v2")
"""Models inside PyPI packages. Their names in `nn.loading.stores` cannot be imported without torch."""
_STORED_NAME = re.compile(r"(?:ollama|lmstudio):[\w./:-]+")


def is_owned(name: str) -> bool:
    """Return True if a name has the form `owner/model` of the hub."""
    return "/" in name and is_hub_id(name)


@cache
def more_fields() -> dict[str, tuple[OptionField, ...]]:
    """Return the options under "more" with their help, by section."""
    by_name = {field.name: field for field in option_fields(TrainConfig)}
    return {section: tuple(by_name[name] for name in names) for section, names in MORE.items()}


def more_for(objective: str) -> dict[str, tuple[OptionField, ...]]:
    """Return the options under "more" that an objective has, by section."""
    by_section = {
        section: tuple(field for field in fields if _is_for(objective, field.name))
        for section, fields in more_fields().items()
    }
    return {section: fields for section, fields in by_section.items() if fields}


def _is_for(objective: str, option: str) -> bool:
    """Return True if an objective uses an option; no objective yet is the first one."""
    known = pages()
    having = {*objectives_with(option), *(name for name, page in known.items() if option in page.reads)}
    return not having or (objective or next(iter(known))) in having


def choices_of(field: OptionField) -> tuple[str, ...]:
    """Return the words that an option takes, or () for a number or a text."""
    members = union_members(field.hint)
    if field.hint is bool:
        return ("False", "True")
    words = [str(word) for member in members if get_origin(member) is Literal for word in get_args(member)]
    return tuple(words) if all(get_origin(member) is Literal or member is type(None) for member in members) else ()


def default_of(field: OptionField) -> str:
    """Return an option's default as text, "" if it has none."""
    default = field.default
    return "" if default in (None, MISSING, ()) else " ".join(default) if isinstance(default, tuple) else str(default)


_WORDS = ("auto", "none")
"""Words that an option may take instead of a number."""


class FieldError(UsageError):
    """A field of the form with a value that is not possible. The step that has the field shows it there."""

    def __init__(self, field: str, what: str, **parts: str | None) -> None:
        super().__init__(what, **parts)
        self.field = field


@contextmanager
def _at(field: str) -> Iterator[None]:
    """Turn an error into one of a field."""
    try:
        yield
    except UsageError as error:
        raise FieldError(field, error.what, why=error.why, next_step=error.next_step) from None


@cache
def _rules(options: type = TrainConfig) -> Mapping[str, Any]:
    """Return the annotation of each option, with its range."""
    rules: dict[str, Any] = {}
    for name, hint in hints_of(options).items():
        rules |= _rules(hint) if is_dataclass(hint) and isinstance(hint, type) else {name: hint}
    return rules


def _parts_of(hint: Any) -> tuple[set[Any], list[Bound]]:
    """Return the types of an annotation, also within a union, and the ranges of its numbers."""
    plain, rules = split_hint(hint)
    kinds: set[Any] = set()
    bounds = [rule for rule in rules if isinstance(rule, Bound)]
    for member in union_members(plain):
        inner = _parts_of(member) if member is not plain else ({plain}, [])
        kinds, bounds = kinds | inner[0], bounds + inner[1]
    return kinds, bounds


@dataclass(frozen=True)
class Draft:
    """The fields of the form, by name. Empty fields are left out."""

    fields: Mapping[str, str]

    @classmethod
    def of(cls, given: Iterable[tuple[str, str]]) -> Draft:
        """Return the draft of a query or a form."""
        return cls({name: value.replace("\r\n", "\n") for name, value in given if value.strip()})

    def get(self, name: str) -> str:
        """Return a field, "" if it is empty."""
        return self.fields.get(name, "")

    @property
    def objective(self) -> str:
        """The objective, or "" before one is chosen."""
        return self.get("objective")

    @property
    def traits(self) -> Traits:
        """Facts of the objective."""
        return recorded_traits({"objective": self.objective} if self.objective else {})

    @property
    def model(self) -> str:
        """Name or path of the model."""
        return self.get("typed_model") or self.get("model") or PACKAGED[0]

    @property
    def model_name(self) -> str:
        """Name of the model, without the folders of a path."""
        return Path(self.model).name if self.model.startswith(("/", "~", ".")) else self.model

    @property
    def learns(self) -> str:
        """Title of the objective, with the columns that are chosen for it."""
        names = offered(self.objective).column_fields()
        columns = [column for name in names if (column := self.get(f"typed_{name}") or self.get(name))]
        return _title(self.objective) + (f" ({', '.join(columns)})" if columns else "")

    def query(self, **changes: str) -> str:
        """Return the fields as the query of an address, with changes."""
        return urlencode({name: value for name, value in {**self.fields, **changes}.items() if value})

    def model_words(self, workspace: Workspace, listed: Iterable[str]) -> list[str]:
        """Return the option of the model.

        Args:
            listed: names of the models on this machine.

        Raises:
            UsageError: the model is a path that this page may not read.
        """
        name = self.get("typed_model") or self.get("model")
        known = name in ("", *PACKAGED, *listed) or is_owned(name) or _STORED_NAME.fullmatch(name)
        with _at("typed_model"):
            return [f"--model={name if known else workspace.allowed(name)}"] if name else []

    def data_words(self, workspace: Workspace) -> list[str]:
        """Return the options of the rows. Raises FieldError: there are none, or this page may not read them."""
        words = [f"--data={self.rows_path(workspace)}", *offered(self.objective).column_words(self)]
        if self.get("eval_fraction"):
            words.append(f"--eval-fraction={self.number('eval_fraction')}")
        return words

    def refused(self, field: str, what: str, next_step: str) -> FieldError:
        """Return the error of a field that is not possible."""
        return FieldError(field, what, next_step=next_step)

    def rows_path(self, workspace: Workspace) -> Path:
        """Return the path of the rows. Raises FieldError: there are none, or this page may not read them."""
        name = self.get("typed_data") or self.get("data")
        if not name:
            raise FieldError("data", "no rows are chosen", next_step="choose or upload a file")
        with _at("typed_data" if self.get("typed_data") else "data"):
            return workspace.allowed(name) if self.get("typed_data") else workspace.upload(name)

    def columns(self) -> list[str]:
        """Return the columns of the rows that the form names."""
        fields = offered(self.objective).column_fields()
        typed = (column for name in fields for column in columns_named(self.get(f"typed_{name}")))
        chosen = (self.get(name) for name in fields if not self.get(f"typed_{name}"))
        return [*typed, *filter(None, chosen)]

    def _objective_words(self, workspace: Workspace) -> list[str]:
        """Return the options of the objective and of what it needs. Raises UsageError: it is incomplete."""
        page = offered(self.objective)
        given = [f"--objective={self.objective}"] if page is not offered("") else []
        return [*given, *page.words(self, workspace.context)]

    def errors(self) -> dict[str, str]:
        """Return the errors of all numbers and questions, by their field."""
        errors = {}
        page = offered(self.objective)
        numbers = ("eval_fraction", *page.numbers(), *self._numbers())
        checks: list[Callable[[], object]] = [partial(page.column_words, self)]
        checks += [partial(self.number, name) for name in numbers if self.get(name) and self.get(name) not in _WORDS]
        for check in checks:
            try:
                check()
            except FieldError as error:
                errors[error.field] = f"{error.what}: {error.next_step}"
        return errors

    def missing_columns(self, columns: Iterable[str]) -> dict[str, str]:
        """Return the errors of texts with columns in braces that the rows do not have, by their field."""
        names = {name: columns_named(self.get(f"typed_{name}")) for name in ("prompt", "state")}
        errors = {}
        for field, missing in ((field, {*named} - {*columns}) for field, named in names.items()):
            for name in missing:
                near = nearest_names(name, columns)
                errors[f"typed_{field}"] = f"there is no column {name}" + f": write {' or '.join(near)}" * bool(near)
        return errors

    def _numbers(self) -> list[str]:
        """Return the fields under "more" that are numbers."""
        shown = (field for fields in more_for(self.objective).values() for field in fields)
        return [f"more.{field.name}" for field in shown if {int, float} & {*union_members(field.hint)}]

    def number(self, name: str) -> str:
        """Return a number as the command line reads it: `20%` and `0,2` are 0.2.

        Raises:
            FieldError: it is none, or out of the option's range.
        """
        option = name.removeprefix("more.")
        hint = _rules().get(option, Count)  # the length of answers is no option
        kinds, bounds = _parts_of(hint)
        whole, label = float not in kinds, _LABELS.get(option, option.replace("_", " "))
        of_one = not whole and any(1 in (bound.at_most, bound.below) for bound in bounds)
        example = "12" if whole else "20% or 0.2" if of_one else "0.2"
        text = self.get(name).replace(" ", "").replace("\u00a0", "")
        share, text = text.endswith("%"), text.removesuffix("%")
        kind = "a whole number" if whole else "a number"
        if not whole and re.fullmatch(r"-?\d*,\d+", text):
            text = text.replace(",", ".")
        try:
            number = float(text)
        except ValueError:
            step = f"write it in digits, such as {example}"
            raise FieldError(name, f"{label} is not {kind}: {self.get(name)}", next_step=step) from None
        if share:
            number, text = number / 100, f"{number / 100:g}"
        if of_one and 1 < number <= 100:
            step = f"write {number:g}% or {number / 100:g}"
            raise FieldError(name, f"{label} is a share of 1, and {self.get(name)} is more", next_step=step)
        try:
            check_value(option, int(number) if int in kinds and number.is_integer() else number, hint)
        except UsageError as error:
            what = error.what.replace(f"{option} ", f"{label} ", 1)
            raise FieldError(name, what, next_step=f"write one such as {example}") from None
        return str(int(number)) if whole else text

    def lint_words(self, workspace: Workspace, listed: Iterable[str]) -> list[str]:
        """Return the words of `lint`. Raises UsageError as `model_words` and `data_words`."""
        self._objective_words(workspace)  # what is missing for the objective is said before the check
        more = [name for name in MORE["data"] if name not in ("option_order", "option_rows")]
        words = [
            *self.model_words(workspace, listed),
            *self.data_words(workspace),
            *self._more([*more, "problem_type", "ranking_loss"]),
        ]
        rows = offered(self.objective).lint_rows or self.traits.rows
        return ["lint", *words, *([f"--{rows}"] if hasattr(LintRunOptions, rows) else [])]

    def run_words(self, workspace: Workspace, listed: Iterable[str]) -> list[str]:
        """Return the options of `train` and `plan`. Raises UsageError as `model_words` and `data_words`."""
        words = [*self.model_words(workspace, listed), *self.data_words(workspace), *self._objective_words(workspace)]
        return words + self._more([name for names in MORE.values() for name in names])

    def train_words(self, workspace: Workspace, listed: Iterable[str], output: Path) -> list[str]:
        """Return the words of `train`. Raises UsageError as `model_words` and `data_words`."""
        return ["train", *self.run_words(workspace, listed), f"--output={output}"]

    def _more(self, names: Iterable[str]) -> list[str]:
        by_name = {field.name: field for fields in more_fields().values() for field in fields}
        words = []
        for name in names:
            value, field = self.get(f"more.{name}"), by_name[name]
            # An earlier choice of the objective may have left options that the page no longer shows.
            if value and value != default_of(field) and _is_for(self.objective, name):
                if {int, float} & {*union_members(field.hint)} and value not in _WORDS:
                    value = self.number(f"more.{name}")
                words.append(f"{field.option}={value}")
        return words


def changed_run(suggested: str, config: Path, output: Path) -> list[str]:
    """Return the words of a suggested command with this run's configuration and another output.

    Raises:
        UsageError: the command contains more than `train` with options that this page offers.
    """
    offered = {field.option for fields in more_fields().values() for field in fields}
    try:
        words = shlex.split(suggested)
    except ValueError:
        words = []
    options = words[3 : words.index("--output")] if "--output" in words else []
    names, values = options[::2], options[1::2]
    if words[:2] != ["backhand", "train"] or not values or len(names) != len(values) or not offered.issuperset(names):
        raise UsageError("this suggestion cannot be started from the page", next_step="copy the command to a terminal")
    return ["train", str(config), *map("{}={}".format, names, values), f"--output={output}"]


def can_be_tried(suggested: str) -> bool:
    """Return True if the page can start a suggested command."""
    try:
        return bool(changed_run(suggested, Path(), Path()))
    except UsageError:
        return False


_OF_AN_OBJECTIVE = ("learning_rate", *MORE["objective"])
"""Options under "more" whose values fit one objective only."""


def other_objective(suggested: str, form: Draft) -> Draft | None:
    """Return the draft of a run with the objective that a suggested command has, or None if it is that of the run."""
    named = re.match(r"backhand train .*--objective (\w+)", suggested)
    if named is None or named[1] not in pages() or named[1] == form.get("objective") or not form.fields:
        return None
    left_out = {f"more.{name}" for name in _OF_AN_OBJECTIVE}
    return Draft({name: text for name, text in form.fields.items() if name not in left_out} | {"objective": named[1]})


_OPTION = re.compile(
    r"(add:? )?--([a-z][a-z0-9-]*[a-z0-9])(?:[ =](?!-|(?:and|or|out|would|instead|with|for|names?(?= the))\b)"
    r"(?:(\w+)=)?('[^']*'(?:\"'\"'[^']*')*|[\w./:%]*[\w%]))?"
)
"""An option after `add`, its name, and its value, which may be `NAME=VALUE`. A conjunction or a verb is no value."""
_NAMES = "|".join(entry.name for entry in COMMANDS)
_COMMAND = re.compile(rf"`?(?<!/)\bbackhand ({_NAMES})\b(?: --help explains every option)?`?")
_TYPED = re.compile(r"(?:(?<=Try: )backhand train|(?<!/)\bbackhand [a-z]+(?= --(?!help))).*")
"""A command with its options, up to the end of the line; one that begins a run is a suggestion."""
_COMMANDS = {
    "train": "the page",
    "lint": "the check of the rows",
    "plan": "the prediction",
    "models": "the step “Model”",
    "chat": "“Try a prompt”",
    "export": "“Use the adapter elsewhere”",
}
"""Parts of the page that do what a command does, by its name."""
IN_TERMINAL = "in a terminal: "
"""Words before a command that the page has no field or button for."""
_UNDER = " under More options"
_PLACES = {
    "model": "the model",
    "data": "the file of rows",
    "prompt": "the first column",
    "completion": "the column of the answer",
    "columns": "the columns",
    "messages": "the columns",
    "state": "“The text to decide about”",
    "question": "“Column with the answers”",
    "eval-data": "a larger share of held-out rows",
    "eval-fraction": "the share of held-out rows under “What to learn”",
    "objective": "“What to learn”",
    "reward": "the checks of answers",
    "context": "the long prompt",
    "output": "the name of the run",
    "resume": "“Continue the run”",
    "help": "the fields",
}
"""Fields and buttons of options outside "more", by the option's name."""


def on_page(text: object, objective: str = "") -> str:
    """Return a message of a command in the words of the page: an option has the name of its field.

    `add: --train-on text` becomes `set “train on” under More options to text`. An option without a field stays. A
    command has the name of the part of the page that does the same, or is marked as one for a terminal.

    Args:
        objective: that of the form, whose columns have labels of their own.
    """
    text = re.sub(r"\n  next: backhand [a-z]+ --help[^\n]*", "", str(text))
    resume = r"(?:(?:[Cc]ontinue|go on) with:?|give) (?:backhand train )?--resume(?: --output (?:'[^']*'|\S+))?"
    text = re.sub(resume, "choose “Continue the run”", text)
    text = re.sub(r"(?<!search )--resume --output (?:'[^']*'|\S+)", "“Continue the run”", text)
    text = re.sub(r"\bhf upload \S+ .*", "choose “Make the file” again", text)
    return "\n".join(_line_on_page(line, objective) for line in text.split("\n"))


_OF_ANSWERS = "chat-template|dtype|force-base|labels|max-new-tokens|system|temperature|threads|top-[kp]"
"""Options of the commands that answer a prompt. Some have the name of an option of training."""


def of_answers(text: str) -> str:
    """Return a message of a command that answers a prompt, with names for its options, which have no field."""
    lines = (line if _TYPED.search(line) else _named_option(line) for line in text.split("\n"))
    return "\n".join(lines)


def _named_option(line: str) -> str:
    return re.sub(rf"--({_OF_ANSWERS})\b", lambda option: f"“{option[1].replace('-', ' ')}” (in a terminal)", line)


def help_on_page(text: str) -> str:
    """Return the help of an option with the names of the fields and objectives of the page."""
    by_name = {field.name: field.name.replace("_", " ") for fields in more_fields().values() for field in fields}
    by_name |= {name: _title(name) for name in pages()}
    text = re.sub(r", see docs/\w+\.md", "", text)
    return re.sub(r"`([^`]*)`", lambda word: f"“{by_name.get(word[1], word[1])}”", text)


def fields_named(text: str) -> list[str]:
    """Return the fields of the form whose options a message names, outside commands to type."""
    more = {field.option[2:]: f"more.{field.name}" for fields in more_fields().values() for field in fields}
    named = re.findall(r"(?:--|^error: (?=[a-z-]+: ))([a-z][a-z-]*[a-z])", _TYPED.sub("", text), re.MULTILINE)
    no_field = ("help", "output", "resume")
    fields = more | {option: option for option in _PLACES if option not in no_field} | {"tokenizer": "model"}
    return [fields[option] for option in named if option in fields]


def _place_of(command: str) -> str:
    """Return the part of the page that does what a command with its options does, "" if there is none."""
    if can_be_tried(command):
        return "“Try again with the suggested change”"
    name = command.split()[1]
    return "" if name == "train" or "--data" in command else _part_of_page(name)


def _column_on_page(option: str, key: str, value: str, objective: str) -> tuple[str, str]:
    """Return the verb and the words for a column that an option names; the verb is "" if it names none.

    Args:
        key, value: `key=value` or `value` after the option, "" if there is none.
    """
    own, every = (
        {role.name: f"“{role.label.partition(' (')[0]}”" for role in roles}
        for roles in (offered(objective).roles, chain.from_iterable(page.roles for page in pages().values()))
    )
    if option == "question" and key:
        return "", "“The question that they answer”"
    if option == "columns" and key not in every:
        return "", ", ".join(own.values()) or _PLACES[option]
    label = own.get(key or option) or every.get(key) or _PLACES[option]
    if value in ("", "COLUMN"):
        return "", label
    column = re.sub(r"^\{([^{}]*)\}$", r"\1", "".join(shlex.split(value)))
    return ("write", f"{column} in the field next to {label}") if "{" in column else ("choose", f"{column} at {label}")


_ROLE = re.compile(
    r"(?<=the row has no )(?:prompt|completion)\b"
    r"|(?<![\w'“`={-])(?:chosen|rejected)(?![\w'”`=}-]| answers?\b)"
    r"|\b\w+(?=(?: and \w+)? are the same text)"
)
"""Names of parts of a row in an error, which the page calls by the labels of their fields."""


def _line_on_page(line: str, objective: str) -> str:
    more = {field.option[2:]: field for fields in more_fields().values() for field in fields}
    if typed := _TYPED.search(line):
        return f"{_line_on_page(line[: typed.start()], objective)}{_place_of(typed[0]) or IN_TERMINAL + typed[0]}"
    end_of_added, verb_before = -1, ""  # of options that follow one after `add`
    aim = re.search(r"--objective (\w+)", line)

    def named(match: re.Match[str]) -> str:
        nonlocal end_of_added, verb_before
        option, key, word = match[2], match[3] or "", match[4] or ""
        add = bool(match[1]) or match.start() == end_of_added
        end_of_added = match.end() + 1 if add else -1
        end = "," if match.string.startswith(" --", match.end()) else ""
        if option in ("prompt", "completion", "columns", "state", "question"):
            verb, shown = _column_on_page(option, key, word, aim[1] if aim else objective)
            again = verb == verb_before and not match[1]
            verb_before = verb
            return f"{f'{verb} ' if add and verb and not again else ''}{shown}{end}"
        word, verb_before = f"{key}={word}" if key else word, ""
        field = more.get(option)
        if field is None and option not in _PLACES:
            return match[0]
        name, under = (_PLACES[option], "") if option in _PLACES else (f"“{option.replace('-', ' ')}”", _UNDER)
        place = name + under
        if field is not None and field.hint is bool:
            return f"set {place} to yes{f' {word}' if word else ''}" if add else f"{place}{f' {word}' if word else ''}"
        is_value = add or word.isupper() or word in names() or re.search(r"^'|[\d:_]", word)
        if word in ("COLUMN", "FILE"):
            return place + end
        if is_value or (field is not None and word in choices_of(field)):
            value = _title(word) if option == "objective" else word
            return f"set {place} to {value}{end}" if add else f"{name} ({value}){under}{end}"
        return f"{place}{f' {word}' if word else ''}"

    if "--eval-fraction" in line:  # the page has this field for both
        line = re.sub(r",? or --eval-data(?: FILE)?(?: with [a-z ]+)?", "", line)
    labels = {role.name: f"“{role.label.partition(' (')[0]}”" for role in offered(objective).roles}
    labels = labels or {name: _PLACES[name] for name in ("state", "question")}
    line = _ROLE.sub(lambda role: labels.get(role[0], role[0]), line)
    name = "|".join(names())
    of_several = rf"--objective ((?:(?:{name})(?:, | or ))+(?:{name}))\b"
    line = re.sub(of_several, lambda several: f"“What to learn” ({re.sub(r'[a-z]{3,}', _titled, several[1])})", line)
    line = re.sub(r"\b(another|larger|no) the ", r"\1 ", _OPTION.sub(named, line))
    return _COMMAND.sub(lambda match: _part_of_page(match[1]) or f"{match[0].strip('`')} in a terminal", line)


def _part_of_page(command: str) -> str:
    """Return the part of the page that does what a command does, or ""."""
    tries = {page.command: page.compares for page in pages().values() if page.command}
    if command in tries:
        return "“Compare two texts”" if tries[command] else "“Try a prompt”"
    return _COMMANDS.get(command, "")


def _title(objective: str) -> str:
    """Return the short name of an objective on the page."""
    page = pages().get(objective)
    return objective if page is None else page.title.partition(":")[0]


def _titled(match: re.Match[str]) -> str:
    return _title(match[0])
