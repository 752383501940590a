"""What the page shows, as HTML. Every text of a model is escaped: whoever publishes one chooses them."""
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from .classifier import Classifier, Label, locate
from .exported import ExportedEnsemble

CSS = '''
.hne-heading h1 { margin: 0; font-size: 1.4rem; overflow-wrap: anywhere; }
.hne-heading p, .hne-text { margin: 0; opacity: 0.75; }
.hne-facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.5rem; margin: 0; }
.hne-facts div { padding: 0.5rem 0.75rem; border: 1px solid var(--border-color-primary); border-radius: 0.25rem; }
.hne-facts dt, .hne-facts dd { margin: 0; }
.hne-facts dt, .hne-facts small { font-size: 0.8rem; opacity: 0.75; }
.hne-facts dd { font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.hne-facts small { display: block; font-weight: 400; }
.hne-note { margin: 0.75rem 0; padding: 0.5rem 0.75rem; border-left: 3px solid var(--color-accent); }
.hne-steps { display: grid; gap: 0.6rem; margin: 0; padding: 0; list-style: none; }
.hne-steps p { display: flex; justify-content: space-between; gap: 0.5rem; margin: 0; font-size: 0.9rem; }
.hne-steps .bar { height: 1.3rem; border-radius: 0.25rem; background: var(--border-color-primary); }
.hne-steps .bar div { height: 100%; border-radius: 0.25rem; background: var(--color-accent); }
.hne-steps .waits { opacity: 0.5; }
.hne-table { width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.hne-table th, .hne-table td { padding: 0.25rem 0.5rem !important; border: 0 !important; text-align: right !important; }
.hne-table tr { border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
.hne-table .chosen { background: var(--color-accent-soft); font-weight: 600; }
#run, #choose { align-self: center; max-height: 3rem; }
.html-container { padding: 0 !important; }
@media (max-width: 40rem) { #picture { height: 200px !important; } }
'''


class Facts(NamedTuple):
    """What is said of a prediction beside its classes.

    Attributes:
        num_members: Number of members evaluated.
        ensemble_size: Number of members that there are.
        milliseconds: Time of the network.
        macs: MACs of the members evaluated.
        all_macs: MACs of all members.
        votes: Number of members whose first class is that of the ensemble.
        entropy: Predictive entropy in nats.
        disagreement: Mutual information in nats.
    """
    num_members: int
    ensemble_size: int
    milliseconds: float
    macs: int
    all_macs: int
    votes: int
    entropy: float
    disagreement: float


class Step(NamedTuple):
    """A step of anytime prediction.

    Attributes:
        num_members: Number of members so far.
        top: The most probable classes.
        milliseconds: Time of the network so far.
        macs: MACs so far.
    """
    num_members: int
    top: Sequence[Label]
    milliseconds: float
    macs: int


def count(num_members: int) -> str:
    """Return '1 member' or 'n members'."""
    return f'{num_members} member{"s" * (num_members > 1)}'


def macs(number: int) -> str:
    """Return a number of multiply-accumulates for people."""
    return f'{number / 1e9:.2f} G' if number >= 1e9 else f'{number / 1e6:.1f} M'


def text(content: str) -> str:
    """Return a plain paragraph."""
    return f'<p class="hne-text">{escape(content)}</p>'


def heading(name: str, classifier: Classifier) -> str:
    """Say which model it is."""
    channels, height, width = classifier.input_size
    return (
        f'<div class="hne-heading"><h1>{escape(name)}</h1><p>{classifier.ensemble_size} networks in a tree that share '
        f'their early layers; {classifier.num_classes} classes; images of {height}x{width}'
        f'{" in grey" * (channels == 1)}; engine: {escape(classifier.engine)}</p></div>')


def facts(values: Facts) -> str:
    """Show what a prediction cost, and how sure it is."""
    n, share = values.num_members, values.macs / values.all_macs
    entries = [
        ('Time of the network', f'{values.milliseconds:.1f} ms', f'{n} of {count(values.ensemble_size)}'),
        ('MACs', macs(values.macs), f'{share:.0%} of all members'),
        ('Agreement', f'{values.votes} of {n}', f'member{"s" * (n > 1)} vote{"s" * (n == 1)} for the first class'),
        ('Uncertainty', f'{values.entropy:.2f} nats', f'entropy; {values.disagreement:.3f} of it mutual information'),
    ]
    return '<dl class="hne-facts">' + ''.join(
        f'<div><dt>{term}</dt><dd>{value}<small>{note}</small></dd></div>' for term, value, note in entries) + '</dl>'


def unsure(usual: float, class_names: Sequence[str]) -> str:
    """Say that a picture may show nothing that the model knows."""
    more = f' and {len(class_names) - 20} more' if len(class_names) > 20 else ''
    return (
        f'<p class="hne-note"><b>Unsure.</b> 95 % of the images that the model was evaluated on get {usual:.0%} or '
        'more for their first class. This one may show nothing that it knows: '
        f'{escape(", ".join(class_names[:20]))}{more}.</p>')


def steps(rows: Sequence[Step], schedule: Sequence[int]) -> str:
    """Show the steps of anytime prediction as bars, those to come empty."""
    items = []
    for row in rows:
        first, *others = row.top
        then = ''.join(f', then {escape(label.name)} {label.probability:.0%}' for label in others)
        items.append(
            f'<li><p><span><b>{escape(first.name)} {first.probability:.0%}</b>{then}</span>'
            f'<span>{row.milliseconds:.1f} ms</span></p>'
            f'<div class="bar"><div style="width: {first.probability:.2%}"></div></div>'
            f'<p><span>{count(row.num_members)}</span><span>{macs(row.macs)} MACs</span></p></li>')
    items += [
        f'<li class="waits"><p><span>&nbsp;</span></p><div class="bar"></div><p><span>{count(n)}</span></p></li>'
        for n in schedule[len(rows):]]
    return f'<ol class="hne-steps">{"".join(items)}</ol>'


def no_evaluation(name: str, classifier: Classifier) -> str:
    """Say what to run for a model whose accuracy is not known."""
    if isinstance(classifier.model, ExportedEnsemble):
        return text(
            'An exported folder holds no evaluation. Open the checkpoint or published folder that it was made of to '
            'see accuracy against MACs.')
    where = locate(name)
    which = where if isinstance(where, str) else f'--checkpoint {where}' if where.is_file() else f'local-dir:{where}'
    return text(
        'The accuracy of these weights is not known. Measure it with '
        f'`timm-hne eval {which} --output evaluation.json`, naming your data, and put the file beside the weights.')


def budget(
        milliseconds: float,
        bought: int | None,
        latency: Mapping[int, float],
        accuracy: Mapping[int, float],
        hardware: str,
) -> str:
    """Say what a budget buys.

    Args:
        milliseconds: The budget.
        bought: Number of members that fit; None if not even the fewest do.
        latency: Milliseconds of n members, by n.
        accuracy: Top-1 accuracy in percent of n members, by n, as far as it is known.
        hardware: Where it was measured.
    """
    if bought is None:
        fewest = min(latency)
        take = 'takes' if fewest == 1 else 'take'
        said = f'{milliseconds:g} ms are too few: {count(fewest)} {take} {latency[fewest]:.1f} ms here.'
    else:
        said = f'{milliseconds:g} ms buy {count(bought)}; the slider is set.'
    columns = ['members', 'ms', *(['accuracy'] if accuracy else [])]
    rows = ''
    for n, ms in latency.items():
        cells = [str(n), f'{ms:.1f}', *([f'{accuracy[n]:.2f} %' if n in accuracy else ''] if accuracy else [])]
        chosen = ' class="chosen"' if n == bought else ''
        rows += f'<tr{chosen}>' + ''.join(f'<td>{cell}</td>' for cell in cells) + '</tr>'
    head = ''.join(f'<th>{column}</th>' for column in columns)
    return (
        f'<p class="hne-note">{said}</p><table class="hne-table"><tr>{head}</tr>{rows}</table>'
        f'{text(f"Median times of one image on this machine: {hardware}.")}')
