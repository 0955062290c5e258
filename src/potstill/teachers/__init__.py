"""Where targets come from."""

from potstill.teachers.base import LogitsTarget as LogitsTarget
from potstill.teachers.base import Teacher as Teacher
from potstill.teachers.local import LocalTeacher as LocalTeacher

__all__ = ["LocalTeacher", "LogitsTarget", "Teacher"]
