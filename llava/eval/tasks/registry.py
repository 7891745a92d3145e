"""All benchmarks, upstream's in its order and those of driving. A new one is a file beside this one and a line here."""

from __future__ import annotations

from llava.eval.tasks import (
    drivelm,
    gqa,
    llava_bench,
    mmbench,
    mme,
    mmvet,
    planning,
    pope,
    science_qa,
    seed,
    senna,
    textvqa,
    vqa,
)
from llava.eval.tasks.task import Column, Task
from llava.utils import UserError

TASKS: tuple[Task, ...] = (
    vqa.VQAV2,
    gqa.TASK,
    vqa.VIZWIZ,
    science_qa.TASK,
    textvqa.TASK,
    pope.TASK,
    mme.TASK,
    mmbench.ENGLISH,
    mmbench.CHINESE,
    mmvet.TASK,
    seed.TASK,
    llava_bench.TASK,
    senna.TASK,
    planning.TASK,
    drivelm.TASK,
)

DEMO: tuple[Task, ...] = (textvqa.TASK, pope.TASK, gqa.TASK, mme.TASK)
"""The benchmarks of the demo."""

COMPARED: tuple[Task, ...] = (*DEMO, *(task for task in TASKS if task.metric and task not in DEMO))
"""The benchmarks that can be scored here, without a server or a grader model."""

COLUMNS: dict[str, Column] = {column.key: column for task in TASKS for column in task.columns}
"""The columns of the paper's tables."""

TASK_OF: dict[str, Task] = {column.key: task for task in TASKS for column in task.columns}
"""Column to benchmark."""


def get_task(name: str) -> Task:
    """The benchmark of that script name, title or folder, whatever the case; `UserError` lists the known names."""
    wanted = name.lower().removesuffix(".sh")
    for task in TASKS:
        if wanted in (task.name, task.title.lower(), task.folder.lower()):
            return task
    raise UserError(f"unknown benchmark {name!r}; known: {', '.join(task.name for task in TASKS)}")
