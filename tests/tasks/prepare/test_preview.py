"""What is learnt is shown as learnt, and data cannot break the page."""

from regrow.tasks.prepare.preview import show

ROW = {
    "messages": [
        {"role": "user", "content": "<script>alert(1)</script> 🦊"},
        {"role": "assistant", "content": "a & b < c\x1b[31m"},
    ]
}


def test_preview_marks_what_is_learnt_and_escapes_everything(bench):
    path = bench.write("a.jsonl", [ROW])
    prepared = bench.run(datasets=[{"path": path, "type": "chat_template"}])
    page = (prepared.out / "preview.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 🦊" in page
    assert "<mark>a &amp; b &lt; c" in page
    assert page.count("<mark>") == 2  # the legend and the answer
    assert "http" not in page


def test_terminal_shows_as_many_as_asked(bench):
    path = bench.write("a.jsonl", [ROW, ROW, ROW])
    prepared = bench.run(datasets=[{"path": path, "type": "chat_template"}])
    shown = show(prepared.out, 2)
    assert shown.count("tokens, ") == 2
    assert "\x1b[32ma & b < c" in shown
    # An escape sequence in the data must not reach the terminal.
    assert "\x1b[31m" not in shown
