"""A request to `AdaptiveRunner`, what becomes of it, and the counts of all of them."""
import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

_logger = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """The request was rejected because too many others are waiting."""


class DeadlineTooShort(Overloaded):
    """The request was rejected because its deadline is too short even where no other is waiting."""


class ShutDown(RuntimeError):
    """The request was rejected because the runner has been shut down."""


class Answer(NamedTuple):
    """What a request's future resolves to.

    Attributes:
        logits: `(num_classes,)`, in single precision on the CPU.
        num_members: Number of members that were evaluated.
    """
    logits: torch.Tensor
    num_members: int


@dataclass
class RunnerStats:
    """Counts since the start. `submitted` is the sum of the others and of the requests that are still waiting.

    Attributes:
        submitted: Requests made of a runner that was not shut down.
        answered: Requests whose future has a result.
        rejected: Requests refused because too many were waiting, or thrown out of the queue by a shutdown.
        failed: Requests whose future has the model's exception.
        cancelled: Requests whose future was cancelled, or resolved, by the client while they waited.
        members: Sum of the members evaluated over the answered requests.
    """
    submitted: int = 0
    answered: int = 0
    rejected: int = 0
    failed: int = 0
    cancelled: int = 0
    members: int = 0


@dataclass(eq=False)
class Request:
    """An image that waits.

    Attributes:
        image: `(C, H, W)`.
        since: When it would have been made if it had the latency target of the others for its deadline.
        limit: Number of members at most; as many as there is time for if None.
        threshold: Probability of the first class at which it gets no further members; none if None.
        future: Future of its `Answer`.
    """
    image: torch.Tensor
    since: float
    limit: int | None = None
    threshold: float | None = None
    future: Future = field(default_factory=Future)

    @property
    def plain(self) -> bool:
        """Whether it takes as many members as the batch gets."""
        return self.limit is None and self.threshold is None


def resolve(future: Future, outcome: Answer | BaseException) -> None:
    """End a request; whatever its client's callbacks raise, the worker and the other requests go on."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except BaseException:
        _logger.exception('a callback of a request failed, or its client resolved it')
