"""A config read field by field, so that in the end every field has been asked for or is reported."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from backhand.errors import ArtifactError


class UnsupportedModel(ArtifactError):
    """A model that the decoder engine does not compute exactly; transformers may still be able to run it.

    Attributes:
        model_type: as the config states it.
        problems: one `field = value: reason` for everything that stands in the way.
    """

    def __init__(self, model_type: str, problems: Collection[str], *, next_step: str | None = None) -> None:
        self.model_type = model_type
        self.problems = tuple(problems)
        super().__init__(
            f"the decoder engine does not know how to compute this {model_type} model",
            where="config.json",
            why="; ".join(self.problems),
            next_step=next_step or "use --engine transformers (or auto), which runs whatever transformers can load",
        )


class ConfigFields:
    """The fields of a config, read by name and type; what nobody reads is a problem unless it is null.

    Args:
        config: the mapping.
        prefix: what to put before a field's name in messages, for a mapping inside another.
        problems: where problems are collected; a mapping inside another shares its parent's list.
    """

    def __init__(self, config: Mapping[str, object], prefix: str = "", problems: list[str] | None = None) -> None:
        self._config = config
        self._prefix = prefix
        self._seen: set[str] = set()
        self.problems: list[str] = [] if problems is None else problems

    def value(self, key: str) -> object:
        """The raw value, None if absent."""
        self._seen.add(key)
        return self._config.get(key)

    def stated(self, key: str) -> bool:
        """Whether the field is there, null or not."""
        return key in self._config

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer, `default` where it is absent or null.

        Raises:
            ArtifactError: if it is another kind of value or below the minimum, or missing without a default.
        """
        value = self._or_default(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(key, value, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number, `default` where it is absent or null.

        Raises:
            ArtifactError: if it is another kind of value, or missing without a default.
        """
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many positive numbers.

        Raises:
            ArtifactError: if it is anything else.
        """
        value = self.value(key)
        expected = f"a list of {count} positive numbers"
        if not isinstance(value, list | tuple) or len(value) != count:
            raise self._wrong(key, value, expected)
        if any(isinstance(item, bool) or not isinstance(item, int | float) or not item > 0 for item in value):
            raise self._wrong(key, value, expected)
        return tuple(float(item) for item in value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            ArtifactError: if it is anything else.
        """
        value = self._or_default(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string.

        Raises:
            ArtifactError: if it is anything else.
        """
        value = self._or_default(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def mapping(self, key: str) -> ConfigFields | None:
        """A mapping inside this one, None if absent or null; its problems are collected here.

        Raises:
            ArtifactError: if it is neither.
        """
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "a mapping")
        return ConfigFields(value, f"{self._prefix}{key}.", self.problems)

    def must_equal(self, key: str, *allowed: object, reason: str | None = None) -> None:
        """Report the field unless it is absent, null, or one of the values for which the engine computes the same."""
        value = self.value(key)
        if value is not None and value not in allowed:
            known = " or ".join(repr(item) for item in allowed) if allowed else "null"
            self.problem(key, reason or f"the engine has {known}")

    def neutral(self, *keys: str) -> None:
        """Fields that do not change what the model computes."""
        self._seen.update(keys)

    def problem(self, key: str, reason: str) -> None:
        """Report a field."""
        self.problems.append(f"{self._prefix}{key} = {_shown(self.value(key))}: {reason}")

    def close(self) -> None:
        """Report every field that nobody asked for and that is not null."""
        for key in self._config:
            if key not in self._seen and self._config[key] is not None:
                self.problem(key, "unknown to the engine")

    def _or_default(self, key: str, default: object) -> object:
        value = self.value(key)
        if value is not None:
            return value
        if default is None:
            raise ArtifactError(
                f"the field {self._prefix}{key} is missing", where="config.json", next_step="fetch the model again"
            )
        return default

    def _wrong(self, key: str, value: object, expected: str) -> ArtifactError:
        return ArtifactError(
            f"{self._prefix}{key} = {_shown(value)} is not {expected}",
            where="config.json",
            next_step="fetch the model again",
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
