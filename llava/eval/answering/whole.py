"""A run as a whole, of which this process may do only a part.

Knows how an `Evaluation` of one process and the dealing out of `sharding` fit together; nothing of models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.answering import parallel as sharding
from llava.eval.answering.loop import INCOMPLETE_STATUS, Evaluation
from llava.eval.answering.metadata import RunMetadata, describe_run
from llava.eval.answering.parallel import Share, World
from llava.eval.common.questions import Question


class Whole:
    """Use: construct, `own_share`, and `merge_if_last` when the share is done.

    Attributes:
        share: what is dealt out to this process; None if it does everything.
    """

    def __init__(
        self, args: argparse.Namespace, questions: Sequence[Question], model_id: str, options: Mapping[str, Any]
    ) -> None:
        self.args, self.questions, self.model_id, self.options = args, questions, model_id, options
        self.share: Share | None = None

    def own_share(self, world: World, image_folder: Path) -> Evaluation:
        """The evaluation of what this process has to do: everything, if it is the only one and nobody left parts."""
        if world.size == 1 and not sharding.is_shared(self.args.answers_file):
            return Evaluation(self.args, self.questions, self.model_id, self.options)
        args = self.args
        crops = sharding.crop_counter(args.model_path)
        described = describe_run(args, self.model_id, self.options, len(self.questions))

        def look() -> sharding.Look:
            return sharding.look_at_answers(
                self.questions,
                args,
                self.model_id,
                self.options,
                lambda meta: RunMetadata(args.answers_file, described).continue_from(meta),
                lambda questions: sharding.question_costs(questions, image_folder, crops),
            )

        own = {"answers_file": str(sharding.part_path(args.answers_file, world.rank)), "resume": True}
        if args.trace_file is not None:
            own["trace_file"] = str(sharding.part_path(args.trace_file, world.rank))
        part_args = argparse.Namespace(**{**vars(args), **own})
        process = (world.rank, world.size)

        def begin(share: Share) -> Evaluation:
            extra = {"plan": share.plan}
            return Evaluation(part_args, share.questions, self.model_id, self.options, process, extra)

        self.share, evaluation = sharding.share_work(world, self.questions, args.answers_file, look, begin)
        return evaluation

    def merge_if_last(self, world: World, status: int) -> int:
        """Merges if all other processes are done as well; returns the exit status, `status` if there is no other."""
        args = self.args
        if self.share is None:
            return status
        counts = sharding.finish_together(world, self.share, self.questions, Path(args.answers_file), args.trace_file)
        if counts is None:
            if not args.quiet:
                print(
                    f"process {world.rank + 1} of {world.size} is done; the last one merges into {args.answers_file}. "
                    "If another one ended early, run the same command again: what is answered is kept",
                    file=sys.stderr,
                )
            return status
        if not args.quiet:
            print(
                f"{counts['answered']} of {counts['total']} questions are answered in {args.answers_file}",
                file=sys.stderr,
            )
        return INCOMPLETE_STATUS if counts["skipped"] or counts["failed"] else 0
