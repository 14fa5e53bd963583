"""Tasks: the inner problems that a learned optimizer is meta-trained on and evaluated with, by name.

A `Task` is a model, a loss and a data set in one. `TASKS` names those that come with the package; your own is a
function that returns `Splits`, named on the command line as `path.py:function`.
"""

from lolo.method.task import Splits, Task, TaskError
from lolo.tasks.by_name import TASKS, outline, pin, resolve
from lolo.tasks.classification import classification
from lolo.tasks.small import books_mlp, fashion_mlp, quadratic

__all__ = [
    "TASKS",
    "Splits",
    "Task",
    "TaskError",
    "books_mlp",
    "classification",
    "fashion_mlp",
    "outline",
    "pin",
    "quadratic",
    "resolve",
]
