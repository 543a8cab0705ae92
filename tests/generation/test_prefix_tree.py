"""Every prediction sits once, behind the right tokens, whatever is shared, dissolved or cut."""

from hypothesis import given
from hypothesis import strategies as st

from tnllm.generation.prefix_tree import PrefixTree, Request

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
REQUESTS = st.lists(
    st.builds(Request, IDS, st.lists(st.integers(0, 2), min_size=1, max_size=4)), min_size=1, max_size=12
)


def path_text(node):
    """Ids from the start of the text to the end of a piece."""
    ids = []
    while node is not None:
        ids = [*node.tokens.tolist(), *ids]
        node = node.parent
    return ids


@given(REQUESTS, st.booleans(), st.sampled_from([0, 3, 32]), st.sampled_from([None, 1, 4]))
def test_every_prediction_follows_its_own_text(requests, share, min_saved, max_piece):
    tree = PrefixTree(requests, share, max_piece, min_saved)
    expected = {}
    for number, request in enumerate(requests):
        whole = [*request.context, *request.continuation]
        for index, token in enumerate(request.continuation):
            before = whole[: len(request.context) + index]
            expected[int(tree.first_target[number]) + index] = (before, token)
    targets = {}
    for node in tree.nodes():
        assert 0 < len(node) <= (max_piece or len(node))
        assert all(child.parent is node and child.start == node.end for child in node.children)
        text = path_text(node)
        for first, tokens, number in node.targets:
            assert len(tokens) and node.start <= first and first + len(tokens) <= node.end
            for index, token in enumerate(tokens.tolist()):
                assert number + index not in targets
                targets[number + index] = (text[: first + index + 1], token)
    assert targets == expected
    assert tree.num_tokens <= tree.plain_tokens == sum(len(r.context) + len(r.continuation) - 1 for r in requests)
    if not share:
        assert tree.num_tokens == tree.plain_tokens


def test_headers_stems_and_equal_contexts_are_there_once():
    header, stems = list(range(100)), [[200] * 40, [300] * 40]
    requests = [Request([*header, *stem], [400 + choice]) for stem in stems for choice in range(4)]
    assert PrefixTree(requests).num_tokens == 100 + 2 * 40
    answers = [Request(header, [400, 401, 402]), Request(header, [500, 501, 502])]
    assert PrefixTree(answers).num_tokens == 100 + 2 * 2


def test_what_saves_too_little_is_not_shared():
    requests = [Request([1, 2, 3, 4 + number], [9]) for number in range(2)]
    assert PrefixTree(requests, min_saved=4).num_tokens == 8
    assert PrefixTree(requests, min_saved=3).num_tokens == 5
