import pytest

from tnllm.cleaning.blocklist import Blocklist
from tnllm.errors import UserError


@pytest.fixture
def found(tmp_path):
    (tmp_path / "words.txt").write_text("# remarks\nCasino\nfree spins  # two words\n赌场\n", encoding="utf-8")
    (tmp_path / "hosts.txt").write_text("bad.example\nwww.worse.example\n")
    return Blocklist.read([str(tmp_path / "words.txt")], [str(tmp_path / "hosts.txt")])


def test_words(found):
    assert found.terms_in("The CASINO gave free spins; free spins again.") == ["casino", "free spins"]
    assert found.terms_in("A casinoesque thing") == []
    assert found.terms_in("网上赌场欢迎你") == ["赌场"]


def test_hosts(found):
    assert found.blocked_host("https://a.b.bad.example/x?y") == "bad.example"
    assert found.blocked_host("http://worse.example") == "worse.example"
    assert found.blocked_host("https://notbad.example/") is None
    assert found.blocked_host(None) is None and found.blocked_host("http://[") is None


def test_missing_list_is_named():
    with pytest.raises(UserError, match=r"no blocklist nowhere.txt"):
        Blocklist.read(["nowhere.txt"], [])
