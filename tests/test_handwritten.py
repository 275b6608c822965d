"""A card that people wrote in, merged with the next one."""

import pytest
from huggingface_hub import RepoCard

from lfrns_hub.hub.card import render_card
from lfrns_hub.hub.handwritten import MARK, merge_cards


def card(name: str = "net", **setup: object) -> str:
    """A card as save renders it."""
    record = {"dense": {"top1_pct": 90.0}, "slim": {"top1_pct": 89.0, "images": 10}, "setup": setup}
    return render_card(record, model_name=name, base="resnet50")


def headings(text: str) -> list[str]:
    """The headings of a card outside of code."""
    parts = RepoCard(text).text.split("```")[::2]
    return [line for part in parts for line in part.splitlines() if line.startswith("#")]


def facts(text: str) -> dict:
    return RepoCard(text).data.to_dict()


def test_a_first_card_gains_nothing_but_marks():
    new = card(dataset="cifar10", license="mit")
    first = merge_cards(new, None)
    assert facts(first) == facts(new)
    assert RepoCard(first).text.replace(MARK, "").split() == RepoCard(new).text.split()
    assert first.count(MARK) == len(headings(new))


def test_merging_again_changes_nothing():
    old = merge_cards(card(), None).replace("\n## Limits", "\n## Mine\n\nText.\n\n## Limits") + "\n# More\n\nText.\n"
    new = card("other", dataset="cifar10")
    once = merge_cards(new, old)
    assert merge_cards(new, once) == once


def test_sections_of_people_stay_behind_what_they_followed():
    old = merge_cards(card(), None)
    front, _, body = old.partition("\n# net")
    old = f"{front}\n> A banner.\n\n# net{body}".replace("\n## Use\n", "\n## Before\n\nMine.\n\n## Use\n")
    old += "\n## After\n\n```python\n# no heading\n## neither\n```\n\n### Below\n\nMine too.\n"
    new = merge_cards(card("net2"), old)
    ours = headings(card("net2"))
    assert headings(new) == [ours[0], "## Before", *ours[1:], "## After", "### Below"]
    assert RepoCard(new).text.lstrip().startswith("> A banner.\n\n# net2\n")
    assert "## After\n\n```python\n# no heading\n## neither\n```\n\n### Below\n\nMine too.\n" in new


def test_a_card_that_is_not_ours_stays_whole_even_under_headings_that_we_use():
    old = "# A model of mine\n\nText.\n\n## Limits\n\nIt knows no owls.\n"
    once = merge_cards(card(), old)
    assert headings(once) == ["# A model of mine", "## Limits", *headings(card())]
    again = merge_cards(card("net2"), once)
    assert headings(again) == ["# A model of mine", "## Limits", *headings(card("net2"))]
    assert "It knows no owls." in again


def test_a_small_heading_in_a_generated_section_begins_a_section_of_a_person():
    old = merge_cards(card(), None).replace("\n## Limits", "\n### Note\n\nMine.\n\n## Limits")
    ours = headings(card())
    at = ours.index("## Limits")
    assert headings(merge_cards(card("net2"), old)) == ["# net2", *ours[1:at], "### Note", *ours[at:]]


def test_a_fence_ends_only_where_markdown_ends_it():
    mine = "## Mine\n\n````md\n```\n# no heading\n````\n\n``` inline ```\n\n~~~\n```\n## neither\n~~~"
    mine += "\n\n## Mine too\n\nText."
    old = merge_cards(card(), None) + f"\n{mine}\n"
    assert merge_cards(card("net2"), old).endswith(f"\n\n{mine}\n")


def test_only_the_first_title_is_ours():
    old = merge_cards(card() + "\n# Notes\n\nMine.\n", None)
    assert headings(merge_cards(card("net2"), old))[-1] == "# Notes"


def test_a_generated_section_that_is_no_longer_written_goes():
    old = merge_cards(card(), None) + f"\n## Retired\n{MARK}\n\nOf an earlier version.\n\n## Mine\n\nText.\n"
    new = merge_cards(card(), old)
    assert "Retired" not in new and headings(new)[-1] == "## Mine"


def test_what_is_written_by_hand_in_the_folder_replaces_the_same_section_and_is_no_generated_one():
    first = merge_cards(card() + "\n## Mine\n\nOne.\n", None)
    second = merge_cards(card() + "\n## Mine\n\nTwo.\n", first)
    assert "Two." in second and "One." not in second
    assert "Two." in merge_cards(card(), second)


def test_a_card_uploaded_by_another_way_is_not_doubled():
    assert merge_cards(card(), card()) == merge_cards(card(), None)
    old = card().replace("\n## Limits", "\n## Mine\n\nText.\n\n## Limits")
    assert headings(merge_cards(card(), old)) == headings(old)


def test_front_matter_of_people_is_kept_where_we_state_nothing():
    old = merge_cards(card(), None).replace("license: unknown", "license: mit\nco2_eq_emissions: 3")
    old = old.replace("tags:\n", "tags:\n- owls\n")
    assert facts(card()) | {"license": "mit", "co2_eq_emissions": 3, "tags": [*facts(card())["tags"], "owls"]} == facts(
        merge_cards(card(), old)
    )
    assert facts(merge_cards(card(license="apache-2.0"), old))["license"] == "apache-2.0"
    named = merge_cards(card(license="other", license_name="owl-1"), None)
    assert facts(merge_cards(card(), named))["license_name"] == "owl-1"
    assert "license_name" not in facts(merge_cards(card(license="apache-2.0"), named))


def test_results_of_replaced_weights_go():
    old = merge_cards(card(dataset="cifar10"), None)
    assert "model-index" in facts(old)
    without = render_card(None, model_name="net", base="resnet50")
    assert "model-index" not in facts(merge_cards(without, old))
    assert "model_name" not in facts(merge_cards(old, merge_cards(without, None)))


@pytest.mark.parametrize("broken", ["---\ntags: [a\n---\n# net\n", "---\njust text\n---\n# net\n"])
def test_front_matter_that_cannot_be_read_is_named(broken):
    with pytest.raises(
        ValueError, match=r"README.md, the card that is there: front matter that cannot be read \(.*\). Mend it"
    ):
        merge_cards(card(), broken)
    with pytest.raises(ValueError, match=r"README.md, the card to be pushed: "):
        merge_cards(broken, None)


def test_a_windows_card_merges():
    old = merge_cards(card(), None) + "\n## Mine\n\nText.\n"
    assert merge_cards(card(), old.replace("\n", "\r\n")) == merge_cards(card(), old)
