"""A skeleton kept for all conversations of a shape tells what asking for each row tells."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from regrow.tasks.prepare.endings import Endings
from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.locating import Locator
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.skeleton import build
from regrow.tasks.prepare.templates import TEMPLATES

END = "<|im_end|>"
# What a template can do to catch out one that has seen only marks.
PIECES = {
    "plain": "<{{ m.role }}>{{ m.content }}" + END,
    "trimmed": "<{{ m.role }}>{{ m.content | trim }}\n" + END,
    "left": "{{ m.role }} {{ m.content.lstrip() }} " + END,
    "lines": "{{ m.role }}\n{{ m.content.strip('\n') }}\n" + END,
    "bare": "{{ m.content }}",
    "bare_trimmed": "{{ m.content | trim }} ",
    "shouted": "<{{ m.role }}>{{ m.content | upper }}" + END,
    "twice": "{{ m.content }}|{{ m.content }}" + END,
    "last_only": "{% if m.role == 'user' or loop.last %}[{{ m.content }}]{% endif %}",
    "long_differently": "{{ '#' if m.content | length > 3 }}{{ m.content }}" + END,
    "branches": "{% if 'a' in m.content %}A: {% endif %}{{ m.content }}" + END,
    "thinks": "{{ m.role }}\n{{ m.content.split('</t>')[-1].lstrip() }}" + END,
    "frames_last": "{{ '<t></t>' if loop.last }}{{ m.content }}" + END,
    "hides": "{% if m.content %}{{ m.role }}:{{ m.content }}{% endif %}" + END,
    "repeats": "{{ m.content }}{{ END }}{% if loop.last %}{{ messages[0].content }}{% endif %}",
}
TEXTS = st.lists(
    st.sampled_from(["a", "b", " ", "\n", "</t>", END, "<user>", "|", "#", "A: ", "\ue0f1"]),
    max_size=5,
).map("".join)


def located(locator: Locator, messages, wanted):
    """The text and the places of messages that are not empty; None when the row is refused."""
    try:
        found = locator.locate(messages, wanted, None)
    except RowError:
        return None
    places = {i: found.places.get(i, (0, 0)) for i in wanted}
    return found.text, {i: place for i, place in places.items() if place[0] < place[1]}


@pytest.mark.parametrize("name", PIECES)
def test_kept_skeletons_tell_what_each_row_tells(name):
    template = ChatTemplate("{% for m in messages %}" + PIECES[name] + "{% endfor %}", {})
    endings = Endings(template, END, (END,), ())
    kept = Locator(template, endings)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(TEXTS, min_size=2, max_size=4))
    @example(["a ", " b"])
    @example([" ", " "])
    @example(["b", "b", "b"])
    def check(texts):
        roles = ("user", "assistant") * 2
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        alone = Locator(template, endings)
        alone._of_shape = lambda messages: None  # ask for this row
        expected, found = located(alone, messages, wanted), located(kept, messages, wanted)
        if expected is None:
            return  # more is proven with all marks at once than with some
        assert found == expected

    check()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_bundled_templates_need_one_rendering_a_row(name):
    """The skeleton of a shape fits every plain conversation of that shape."""
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    roles = ("system", "user", "assistant", "user", "assistant")
    first = [{"role": role, "content": "x"} for role in roles]
    other = [{"role": role, "content": f" {role}\n {n} \n"} for n, role in enumerate(roles)]
    skeleton = build(template, first, [(i, "content") for i in range(len(first))])
    assert skeleton is not None
    assert skeleton.fit(template.render(other), other) is not None


def test_what_is_stripped_is_known_of_each_text():
    text = (
        "{% for m in messages %}[{{ m.content | trim if loop.first else m.content }}]{% endfor %}"
    )
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": " b "}]
    template = ChatTemplate(text, {})
    skeleton = build(template, messages, [(0, "content"), (1, "content")])
    assert skeleton is not None
    assert skeleton.fit(template.render(messages), messages) == [1, 2, 4, 7]
    assert skeleton.literals == ("[", "][", "]")


def test_row_that_differs_anywhere_does_not_fit():
    template = ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}", {})
    messages = [{"role": "user", "content": "a"}]
    skeleton = build(template, messages, [(0, "content")])
    assert skeleton is not None
    assert skeleton.fit("a;", messages) == [0, 1]
    assert skeleton.fit("a; ", messages) is None
    assert skeleton.fit("b;", messages) is None
