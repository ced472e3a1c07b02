"""What may be asked of a source beside its name."""

from __future__ import annotations

from dataclasses import dataclass, fields

from thresher.compiler.errors import UsageError


@dataclass(frozen=True)
class SourceOptions:
    """Wishes about a source; None leaves the choice to the source.

    Attributes:
        weights: a file, ``"pretrained"``, ``"random"`` or ``"included"``.
        resolution: height and width of the image in pixels.
        length: fixed length of the sequence: tokens of text, samples or frames of sound.
        outputs: names of the outputs to keep, in order.
    """

    weights: str | None = None
    resolution: tuple[int, int] | None = None
    length: int | None = None
    outputs: tuple[str, ...] | None = None

    def allow(self, kind: str, *taken: str) -> None:
        """Refuse a wish that sources of this kind cannot fulfil.

        Raises:
            UsageError: an option beyond ``taken`` is set.
        """
        for option in fields(self):
            if getattr(self, option.name) is not None and option.name not in taken:
                can = f"; it takes {', '.join(taken)}" if taken else ""
                raise UsageError(f"a source of kind {kind} takes no option {option.name!r}{can}")

    def square(self) -> int | None:
        """The side of a square resolution.

        Raises:
            UsageError: height and width differ.
        """
        if self.resolution is None:
            return None
        height, width = self.resolution
        if height != width:
            raise UsageError(f"this model takes square images, not {height}x{width}")
        return height


def keep_outputs(
    names: tuple[str, ...], wanted: tuple[str, ...] | None, source: str
) -> tuple[str, ...]:
    """The outputs to keep: those wanted, in the wanted order, or all.

    Raises:
        UsageError: the model has no output of that name.
    """
    for name in wanted or ():
        if name not in names:
            raise UsageError(f"{source} has no output {name!r}: it has {', '.join(names)}")
    return wanted or names
