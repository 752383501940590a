"""The integer arithmetic of the tree, against its definition."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_hne.tree import MAX_NODES, node_span, prefixes, validate_nodes, validate_num_members


@st.composite
def trees(draw):
    """Numbers of nodes whose entries divide the next one."""
    nodes = [draw(st.integers(1, 4))]
    for branching in draw(st.lists(st.integers(1, 4), max_size=5)):
        nodes.append(min(nodes[-1] * branching, nodes[-1] * (MAX_NODES // nodes[-1])))
    return tuple(nodes)


@st.composite
def trees_and_members(draw):
    nodes = draw(trees())
    start = draw(st.integers(0, nodes[-1] - 1))
    return nodes, start, draw(st.integers(start + 1, nodes[-1]))


@given(trees())
def test_a_tree_of_dividing_entries_is_valid(nodes):
    assert validate_nodes(nodes) == nodes
    assert validate_nodes(list(nodes), num_blocks=len(nodes)) == nodes


@given(trees(), st.integers(0, 8))
def test_nodes_of_another_number_of_blocks_are_refused(nodes, num_blocks):
    if num_blocks != len(nodes):
        with pytest.raises(ValueError, match=f'nodes .*{num_blocks} .*{len(nodes)}'):
            validate_nodes(nodes, num_blocks)


@given(st.lists(st.integers(-2, 12), min_size=1, max_size=6))
def test_nodes_are_valid_exactly_if_they_are_a_tree(nodes):
    if min(nodes) >= 1 and all(b % a == 0 for a, b in zip(nodes, nodes[1:])):
        assert validate_nodes(nodes) == tuple(nodes)
    else:
        with pytest.raises(ValueError, match='nodes') as error:
            validate_nodes(nodes)
        assert str(tuple(nodes)) in str(error.value)


@pytest.mark.parametrize('nodes', ['12', b'12', 4, None, {1, 2}, (1, 2.0), (1, '2'), (True, 2), (1, None)])
def test_nodes_that_are_no_integers_are_a_type_error(nodes):
    with pytest.raises(TypeError, match='nodes'):
        validate_nodes(nodes)


@pytest.mark.parametrize('nodes', [(MAX_NODES,) * 5, (1, MAX_NODES), (MAX_NODES + 1,), (1, 2, 16384), (2 ** 62,) * 5])
def test_absurd_trees_are_refused(nodes):
    if max(nodes) <= MAX_NODES:
        assert validate_nodes(nodes) == nodes
    else:
        with pytest.raises(ValueError, match=f'nodes .*{MAX_NODES} .*{max(nodes)}'):
            validate_nodes(nodes)


def test_no_nodes():
    with pytest.raises(ValueError, match='nodes'):
        validate_nodes(())


@given(trees_and_members())
def test_a_span_is_the_set_of_nodes_that_its_members_run_through(tree_and_members):
    nodes, start, stop = tree_and_members
    for count in nodes:
        members = [member * count // nodes[-1] for member in range(start, stop)]
        first, last = node_span(count, start, stop, nodes[-1])
        assert set(range(first, last)) == set(members)


@given(trees_and_members())
def test_the_parents_of_a_span_are_the_span_of_the_previous_block(tree_and_members):
    nodes, start, stop = tree_and_members
    for parents, children in zip(nodes, nodes[1:]):
        first, last = node_span(children, start, stop, nodes[-1])
        branching = children // parents
        expected = {child // branching for child in range(first, last)}
        assert set(range(*node_span(parents, start, stop, nodes[-1]))) == expected


@given(trees())
def test_the_nodes_of_a_prefix_grow_with_it_and_end_with_all(nodes):
    for count in nodes:
        spans = [node_span(count, 0, n, nodes[-1]) for n in range(1, nodes[-1] + 1)]
        assert all(first == 0 for first, _ in spans)
        assert [last for _, last in spans] == [-(-n * count // nodes[-1]) for n in range(1, nodes[-1] + 1)]
        assert spans[-1] == (0, count)


@given(st.integers(1, 1000))
def test_prefixes_are_the_powers_of_two_below_n_then_n(ensemble_size):
    points = prefixes(ensemble_size)
    assert points == (*[2 ** b for b in range(10) if 2 ** b < ensemble_size], ensemble_size)


def test_the_papers_operating_points():
    assert prefixes(16) == (1, 2, 4, 8, 16)
    assert prefixes(12) == (1, 2, 4, 8, 12)
    assert prefixes(1) == (1,)


@given(st.integers(-3, 20), st.integers(1, 16))
def test_num_members_is_valid_from_1_to_n(num_members, ensemble_size):
    if 1 <= num_members <= ensemble_size:
        assert validate_num_members(num_members, ensemble_size) == num_members
    else:
        with pytest.raises(ValueError, match=f'num_members .*1 .*{ensemble_size}.* {num_members}'):
            validate_num_members(num_members, ensemble_size)


@pytest.mark.parametrize('num_members', [True, False, 2.0, '2', [2], None, (1,), 1j])
def test_num_members_of_another_type_is_a_type_error(num_members):
    with pytest.raises(TypeError) as error:
        validate_num_members(num_members, 8)
    message = str(error.value)
    assert 'num_members' in message and '1 to 8' in message and repr(num_members) in message
