"""`xl list -v` is read strictly: what is not understood, or could be somebody's forgery, is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import HypervisorFailed
from proxy.hypervisors.xl_list import XlDomain, read_list
from proxy.limits import XL_DOMAINS_MAX

UUID = "0f9c2f1e-0000-4000-8000-00000000abcd"
HEAD = (
    "Name                                        ID   Mem VCPUs\tState\tTime(s)"
    "   UUID                            Reason-Code\tSecurity Label\n"
)


def line(name: str, domid: int, state: str = "-b----", *, uuid: str = UUID, reason: str = "-", label: str = "-") -> str:
    """As printf of list_domains() makes it."""
    return f"{name:<40} {domid:5d} {96:5d} {1:5d}     {state}  {1.5:8.1f} {uuid} {reason:>8} {label:>16}\n"


DOM0 = line("Domain-0", 0, "r-----", uuid="00000000-0000-0000-0000-000000000000")


@pytest.mark.parametrize(
    ("state", "reason", "flags"),
    [
        ("r-----", "-", {}),
        ("-b----", "-", {}),
        ("------", "-", {}),
        ("--p---", "-", {"paused": True}),
        ("---ss-", "2", {"shutdown": True, "reason": "s"}),
        ("--pss-", "2", {"paused": True, "shutdown": True, "reason": "s"}),
        ("---s--", "0", {"shutdown": True}),
        ("---sr-", "1", {"shutdown": True, "reason": "r"}),
        ("---sc-", "3", {"shutdown": True, "reason": "c"}),
        ("---s?-", "ff", {"shutdown": True, "reason": "?"}),
        ("--ps-d", "0", {"paused": True, "shutdown": True, "dying": True}),
    ],
)
def test_the_letters(state: str, reason: str, flags: dict[str, bool]) -> None:
    assert read_list(HEAD + DOM0 + line("g1", 7, state, reason=reason))[1] == XlDomain(7, "g1", UUID, **flags)


@pytest.mark.parametrize(
    "name",
    [
        "g1",
        "a b  c",
        "x" * 40,
        "x" * 255,
        "-b----",
        "(null)",
        "naïve",
        # Whoever named it wants it to be taken for the running domain 5 called g1.
        line("g1", 5).rstrip("\n"),
    ],
)
def test_names_of_all_kinds(name: str) -> None:
    domain = read_list(HEAD + line(name, 12345, label="system_u:system_r:domU_t"))[0]
    assert (domain.name, domain.domid) == (name, 12345)


def test_a_domain_without_a_name() -> None:
    assert read_list(HEAD + line("", 3))[0].name == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEAD,
        "Name ID\n",
        HEAD.replace("UUID", "GUID") + DOM0,
        HEAD + "g1\n",
        HEAD + line("g1", 7, "-b---"),
        HEAD + line("g1", 7, "xb----"),
        HEAD + line("g1", 7, uuid="0f9c2f1e"),
        HEAD + line("g1", 7, uuid=UUID.upper()),
        HEAD + line("g1", 123456),
        HEAD + DOM0 + "\n",
        HEAD + DOM0[:-20],
        "libxl: error\n" + HEAD + DOM0,
    ],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(HypervisorFailed, match="not understood"):
        read_list(text)


def test_a_name_with_a_line_break_cannot_stand_for_another_domain() -> None:
    forged = "evil\n" + line("g1", 7, "---ss-").rstrip("\n")
    with pytest.raises(HypervisorFailed):
        read_list(HEAD + DOM0 + line(forged, 8))
    # Not even if its first half is made to look whole.
    with pytest.raises(HypervisorFailed, match="twice"):
        read_list(HEAD + DOM0 + line("g1", 7) + line("evil", 8) + line("g1", 7, "---ss-"))


def test_there_is_a_limit() -> None:
    assert len(read_list(HEAD + "".join(line("g", number) for number in range(XL_DOMAINS_MAX)))) == XL_DOMAINS_MAX
    with pytest.raises(HypervisorFailed, match="more than"):
        read_list(HEAD + "".join(line("g", number) for number in range(XL_DOMAINS_MAX + 1)))


@given(st.one_of(st.text(max_size=300), st.builds(lambda middle: HEAD + DOM0 + middle, st.text(max_size=300))))
def test_any_text_is_a_list_or_refused(text: str) -> None:
    try:
        domains = read_list(text)
    except HypervisorFailed:
        return
    assert domains


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=60),
            st.sampled_from(["-b----", "--p---", "---ss-"]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_what_was_listed_is_read(listed: list[tuple[str, str]]) -> None:
    text = HEAD + "".join(line(name, number, state) for number, (name, state) in enumerate(listed))
    assert [(domain.name, domain.domid) for domain in read_list(text)] == [
        (name, number) for number, (name, _) in enumerate(listed)
    ]
