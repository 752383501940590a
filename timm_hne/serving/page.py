"""The page of `timm-hne app`: a model to try in a browser, made with Gradio."""
import abc
import functools
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from ..checks import check_integer, check_number
from ..evaluation.metrics import mutual_information, predictive_entropy
from ..evaluation.plots import draw_accuracy
from ..inference.latency import LatencyTable
from . import views
from .classifier import Classifier, ImageError
from .exported import ExportedEnsemble

__all__ = ['EXAMPLES', 'Page', 'build', 'launch']

EXAMPLES = tuple(sorted(Path(__file__).with_name('examples').glob('*.[jp][pn]g')))
MAX_FILE_SIZE = 20 << 20  # bytes of an upload
CLASSES_SHOWN = 5
KEPT_SECONDS = 3600  # uploads are deleted after that


def _read(self, payload) -> bytes | None:
    """Return the bytes of an upload, and of no other file of this machine.

    Gradio makes sure of that for files that are marked as such, and a client may leave out the mark.
    """
    if payload is None:
        return None
    folder = Path(self.GRADIO_CACHE).resolve()
    if not payload.path or not Path(payload.path).resolve().is_relative_to(folder):
        raise _error('the picture must be uploaded as a file')
    return Path(payload.path).read_bytes()


async def _cache(self, path: str | Path | None) -> str | None:
    """Refuse an address in the place of an upload: nobody makes this machine fetch something."""
    if '://' in str(path):
        raise _error('the picture must be uploaded as a file')
    return await gr.Image.async_move_resource_to_block_cache(self, path)


# Gradio's own component opens the picture itself, and shows what Pillow says of a broken one. This is
# `class Picture(gr.Image)`, but for the file with types that Gradio would write beside this one.
Picture = abc.ABCMeta.__new__(type(gr.Image), 'Picture', (gr.Image,), {
    'preprocess': _read, 'async_move_resource_to_block_cache': _cache, 'is_template': True, '__module__': __name__})


class _NoRelay:
    """Refuses requests for what lies on other hosts, which Gradio would fetch for whoever asks (ASGI middleware)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope['type'] == 'http' and any(f'{name}=http' in scope['path'].lower() for name in ('file', 'proxy')):
            await PlainTextResponse('Files of other hosts are not served.', 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


@contextmanager
def _told() -> Iterator[None]:
    """Let the page show what is wrong with an input, in one sentence. Other errors are the server's: it logs them."""
    try:
        yield
    except (ImageError, ValueError, TypeError) as error:
        raise _error(error) from error


def _error(reason: object) -> gr.Error:
    text = ' '.join(str(reason).split()).rstrip('.')
    return gr.Error(f'{text[:1].upper()}{text[1:]}.', print_exception=False)


class Page:
    """What the page does, without the page.

    Args:
        classifier: The model.
        name: The name that it was opened by.
    """

    def __init__(self, classifier: Classifier, name: str):
        self.classifier = classifier
        self.name = name
        # One evaluation at a time: the times shown are those of a model that has the machine to itself.
        self._busy = threading.Lock()
        self._table: LatencyTable | None = None

    def prepare(self) -> None:
        """Go through all numbers of members once, so that no picture waits for a program."""
        image = torch.zeros(1, *self.classifier.input_size)
        for num_members in range(self.classifier.ensemble_size, 0, -1):
            self.classifier.member_logits(image, num_members)
        self.classifier.warm_up()

    def macs(self, num_members: int) -> int:
        """Return the MACs that evaluating n members takes."""
        if isinstance(self.classifier.model, ExportedEnsemble):  # which goes on to the next number of its schedule
            num_members = next(n for n in self.classifier.prefixes if n >= num_members)
        return self.classifier.macs[num_members]

    def predict(self, picture: bytes | None, num_members: int) -> tuple[dict[str, float] | None, str]:
        """Return the probabilities of the first classes by their names, and what else is to be said, as HTML.

        Args:
            picture: An image file; None if there is none.
            num_members: Number of members that are evaluated.

        Raises:
            ImageError: `picture` is no image that can be used.
            ValueError: `num_members` is out of range.
        """
        if picture is None:
            return None, ''
        image, num_members = self.classifier.image(picture)[None], int(num_members)
        with self._busy:
            # The shorter of two: the first finds the caches full of what reading the picture left there.
            seconds = math.inf
            for _ in range(2):
                begin = time.perf_counter()
                members = self.classifier.member_logits(image, num_members)
                seconds = min(seconds, time.perf_counter() - begin)
        logits = members.mean(dim=1)[0]
        top = self.classifier.top(logits, num_members, CLASSES_SHOWN)
        names = Counter(label.name for label in top)
        shown = {
            label.name if names[label.name] == 1 else f'{label.name} ({label.index})': label.probability
            for label in top}
        facts = views.Facts(
            num_members=num_members,
            ensemble_size=self.classifier.ensemble_size,
            milliseconds=1000 * seconds,
            macs=self.macs(num_members),
            all_macs=self.macs(self.classifier.ensemble_size),
            votes=int((members[0].argmax(dim=-1) == logits.argmax()).sum()),
            entropy=predictive_entropy(members).item(),
            disagreement=mutual_information(members).item(),
        )
        usual = self.classifier.usual_confidence(num_members)
        unsure = views.unsure(usual, self.classifier.class_names) if top[0].probability < usual else ''
        return shown, views.facts(facts) + unsure

    def anytime(self, picture: bytes | None, pause: float = 0.) -> Iterator[str]:
        """Yield the predictions so far, as HTML, after 1, 2, 4, ..., N members.

        Args:
            picture: An image file; None if there is none.
            pause: Seconds to wait between two steps, for eyes to follow. They do not count.

        Raises:
            ImageError: `picture` is no image that can be used.
            ValueError: `pause` is out of range.
        """
        check_number('pause', pause, 0, 5)
        if picture is None:
            raise ImageError('choose a picture first')
        image = self.classifier.image(picture)[None]
        schedule, rows, seconds = self.classifier.prefixes, [], 0.
        steps = self.classifier.anytime(image)
        for num_members in schedule:
            if rows:
                time.sleep(pause)
            with self._busy:
                begin = time.perf_counter()
                _, logits = next(steps)
                seconds += time.perf_counter() - begin
            rows.append(views.Step(
                num_members, self.classifier.top(logits[0], num_members, 2), 1000 * seconds, self.macs(num_members)))
            yield views.steps(rows, schedule)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The evaluation of the model, a row for each number of members with its accuracy and MACs; [] if unknown."""
        return [
            {'num_members': n, 'top1': row['top1'], 'macs': self.classifier.macs[n]}
            for n, row in sorted((self.classifier.results or {}).items()) if n in self.classifier.macs]

    def table(self, again: bool = False) -> LatencyTable:
        """Return the latencies on this machine, measured when first asked for, or `again`."""
        with self._busy:
            if again or self._table is None:
                self._table = LatencyTable.measure(
                    self.classifier.model, self.classifier.input_size, (1,), num_members=self.classifier.prefixes)
            return self._table

    def budget(self, milliseconds: float, again: bool = False) -> tuple[str, int | None]:
        """Say as HTML what a budget buys on this machine, and return the number of members, None if not even one fits.

        Args:
            milliseconds: What the network may take for one image.
            again: Measure again.

        Raises:
            TypeError: The budget is no number.
            ValueError: It is not above 0.
        """
        check_number('the budget', milliseconds, 0, above=True)
        latency = self.table(again).latency_ms[1]
        fits = min(latency.values()) <= milliseconds
        bought = self.table().members_for(latency_ms=milliseconds) if fits else None
        accuracy = {row['num_members']: row['top1'] for row in self.rows}
        return views.budget(milliseconds, bought, latency, accuracy, self.table().environment['hardware']), bought


def build(classifier: Classifier, name: str) -> gr.Blocks:
    """Build the page of a model.

    Args:
        classifier: The model.
        name: What the page calls it.
    """
    page = Page(classifier, name)
    page.prepare()
    size = classifier.ensemble_size

    def predict(picture, num_members):
        with _told():
            return page.predict(picture, num_members)

    def anytime(picture, seconds):
        with _told():
            yield from page.anytime(picture, seconds)

    def spend(milliseconds, again=False):
        with _told():
            said, num_members = page.budget(milliseconds, again)
            return said, gr.skip() if num_members is None else num_members

    private = dict(api_visibility='private', show_progress='hidden')
    with gr.Blocks(
            title=f'timm_hne: {name}', analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
        gr.HTML(views.heading(name, classifier))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = Picture(label='Picture', type='filepath', height=260, buttons=[], elem_id='picture')
                gr.Examples(
                    list(map(str, EXAMPLES)), picture, label='or one of these', cache_examples=False,
                    elem_id='examples')
                members = gr.Slider(
                    1, max(size, 2), value=size, step=1, interactive=size > 1, label='Members evaluated',
                    elem_id='members')
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab('Predict', id='predict'):
                    classes = gr.Label(label='Classes', num_top_classes=CLASSES_SHOWN, elem_id='classes')
                    facts = gr.HTML(elem_id='facts')
                with gr.Tab('Anytime', id='anytime'):
                    gr.HTML(views.text(
                        'A prediction after every step, nothing computed twice: stop whenever you must.'))
                    with gr.Row():
                        run = gr.Button('Run', variant='primary', min_width=120, scale=1, elem_id='run')
                        pause = gr.Slider(
                            0, 1, value=0.4, step=0.1, label='Pause (s)', scale=2, min_width=160)
                    steps = gr.HTML(views.steps([], classifier.prefixes), elem_id='steps')
                with gr.Tab('Accuracy and cost', id='cost'):
                    if page.rows:
                        plot = gr.Plot(draw_accuracy(page.rows, size), show_label=False, elem_id='accuracy')
                        members.change(
                            lambda n: draw_accuracy(page.rows, n), members, plot, trigger_mode='always_last', **private)
                    else:
                        gr.HTML(views.no_evaluation(name, classifier), elem_id='accuracy')
                    with gr.Row():
                        budget = gr.Number(
                            value=10, label='Budget for one image (ms)', minimum=0, scale=2, min_width=160,
                            elem_id='budget')
                        choose = gr.Button('Choose', variant='primary', scale=1, min_width=120, elem_id='choose')
                    bought = gr.HTML(
                        views.text('The first choice measures this machine; that takes a moment.'), elem_id='bought')
                    measure = gr.Button('Measure again', size='sm', elem_id='measure')
        again = dict(private, trigger_mode='always_last', inputs=[picture, members], outputs=[classes, facts])
        gr.on([picture.change, members.change], predict, **again)
        run.click(anytime, [picture, pause], steps, concurrency_limit=8, **private)
        # In the order of the clicks.
        buys = dict(private, show_progress='minimal', concurrency_id='budget', inputs=budget, outputs=[bought, members])
        gr.on([choose.click, budget.submit], spend, **buys)
        measure.click(functools.partial(spend, again=True), **buys)
    return blocks


def launch(
        blocks: gr.Blocks,
        host: str = '127.0.0.1',
        port: int | None = None,
        browser: bool = False,
) -> str:
    """Serve a page in threads of their own until `blocks.close()`; nothing is sent anywhere but to its visitors.

    Args:
        blocks: What `build` returned.
        host: Address that the page is bound to; '0.0.0.0' for all of this machine's.
        port: Port; the first free one from 7860 if None.
        browser: Open the page in a browser.

    Returns:
        The address of the page.

    Raises:
        OSError: The address is not this machine's, or the port is taken.
        ValueError: `port` is none.
    """
    if port is not None:
        check_integer('port', port, 1, 65535)
    try:  # Gradio's own messages are about its settings
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        socket.create_server((host.strip('[]'), port or 0), family=family).close()
    except OSError as error:
        where = host if port is None else f'{host}:{port}'
        raise OSError(f'the page cannot be bound to {where}: {error.strerror}.') from error
    _, url, _ = blocks.launch(
        server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True, share=False,
        ssr_mode=False, mcp_server=False, enable_monitoring=False, run_history=False, pwa=False, footer_links=[],
        max_file_size=MAX_FILE_SIZE, css=views.CSS, app_kwargs={'middleware': [Middleware(_NoRelay)]})
    return url
