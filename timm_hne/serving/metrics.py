"""What the service counts, in Prometheus's format."""
import os
from pathlib import Path

# Folder that all processes of a service on this machine share; without one, each reports itself alone.
FOLDER = 'TIMM_HNE_METRICS_DIR'

if os.environ.get(FOLDER):
    Path(os.environ[FOLDER]).mkdir(parents=True, exist_ok=True)
    os.environ['PROMETHEUS_MULTIPROC_DIR'] = os.environ[FOLDER]  # prometheus_client reads it when it is imported

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest  # noqa: E402
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE  # noqa: E402
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead  # noqa: E402

__all__ = ['CONTENT_TYPE', 'FOLDER', 'Metrics', 'Refusals']

_BUCKETS = (.005, .01, .02, .035, .05, .075, .1, .15, .25, .5, 1., 2.5, 5., 10.)


class Refusals:
    """Counts of requests by their status, and of those that were refused by the reason.

    Attributes:
        registry: Where they are registered.
        requests: `hne_requests_total`, by status.
        rejected: `hne_rejected_total`, by reason.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            'hne_requests', 'Requests by the status of their answer.', ['status'], registry=self.registry)
        self.rejected = Counter(
            'hne_rejected', 'Requests that were refused, by reason.', ['reason'], registry=self.registry)

    def refuse(self, status: int, reason: str) -> None:
        """Count a request that was refused."""
        self.requests.labels(status).inc()
        self.rejected.labels(reason).inc()


class Metrics(Refusals):
    """All that the service counts.

    Args:
        prefixes: Numbers of members that answers usually have.

    Attributes:
        seconds: `hne_request_seconds`, of the requests that were answered.
        members: `hne_members`, members of an answer.
        queue: `hne_queue`, requests that wait.
    """

    def __init__(self, prefixes: tuple[int, ...]):
        super().__init__()
        self.seconds = Histogram(
            'hne_request_seconds', 'Time of a request that was answered, from its last byte to the answer.',
            registry=self.registry, buckets=_BUCKETS)
        self.members = Histogram(
            'hne_members', 'Members that were evaluated for an answer.', registry=self.registry, buckets=prefixes)
        self.queue = Gauge(
            'hne_queue', 'Requests that wait for a batch.', registry=self.registry, multiprocess_mode='livesum')

    def report(self) -> bytes:
        """Return all counts as text."""
        folder = os.environ.get(FOLDER)
        if not folder:
            return generate_latest(self.registry)
        for path in Path(folder).glob('gauge_live*_*.db') if os.name == 'posix' else ():  # elsewhere 0 is a signal
            pid = int(path.stem.rpartition('_')[2])
            try:
                os.kill(pid, 0)
            except (ProcessLookupError, PermissionError):  # killed before it could say so; its number may be another's
                mark_process_dead(pid, folder)
        shared = CollectorRegistry()
        MultiProcessCollector(shared, folder)
        return generate_latest(shared)
