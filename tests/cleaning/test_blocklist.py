import pytest

from tnllm.cleaning.blocklist import Blocklist
from tnllm.errors import UserError


@pytest.fixture
def blocklist(tmp_path):
    (tmp_path / "words.txt").write_text("# comments\nCasino\nfree spins  # two words\n赌场\n", encoding="utf-8")
    (tmp_path / "hosts.txt").write_text("bad.example\nwww.worse.example\n")
    return Blocklist.read([str(tmp_path / "words.txt")], [str(tmp_path / "hosts.txt")])


def test_words(blocklist):
    assert blocklist.terms_in("The CASINO gave free spins; free spins again.") == ["casino", "free spins"]
    assert blocklist.terms_in("A casinoesque thing") == []
    assert blocklist.terms_in("网上赌场欢迎你") == ["赌场"]


def test_hosts(blocklist):
    assert blocklist.blocked_host("https://a.b.bad.example/x?y") == "bad.example"
    assert blocklist.blocked_host("http://worse.example") == "worse.example"
    assert blocklist.blocked_host("https://notbad.example/") is None
    assert blocklist.blocked_host(None) is None and blocklist.blocked_host("http://[") is None


def test_missing_list_is_named():
    with pytest.raises(UserError, match=r"no blocklist nowhere.txt"):
        Blocklist.read(["nowhere.txt"], [])
