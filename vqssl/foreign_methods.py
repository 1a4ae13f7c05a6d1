"""Methods of other libraries, and ours without their underscore: a call raises an error that names ours."""

from typing import Any, NoReturn

__all__ = ["ForeignMethod"]


class ForeignMethod:
    """A class attribute under the name of a method that the class does not have.

    Only a call raises. If access raised, :class:`torch.nn.Module` would look for a buffer and say its own words.

    Args:
        cure: what to write instead, as in ``"update_(student)"``.

    >>> class Teacher:
    ...     update = ForeignMethod("update_(student)")
    >>> Teacher().update(None)
    Traceback (most recent call last):
    AttributeError: Teacher has no method 'update': write .update_(student)
    """

    def __init__(self, cure: str) -> None:
        self.cure = cure

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner.__name__, name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise AttributeError, whatever the arguments."""
        raise AttributeError(f"{self.owner} has no method {self.name!r}: write .{self.cure}")
