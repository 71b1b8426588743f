"""What MLflow's pages say: links that work, and users that are replaced, not piled up."""

from regrow.flows import descriptions as text
from regrow.infra import mlflow_pages


def test_users_are_the_second_paragraph_and_replace_those_before():
    page = "loss 1.0\n\n**Made from** x\n\n**Key** `k`"
    once = text.with_use(page, text.used_by(["[a](#/a)"]))
    assert once.split("\n\n")[1] == "**Used by**  \n[a](#/a)"
    twice = text.with_use(once, text.used_by(["[b](#/b)", "[a](#/a)"]))
    assert twice.split("\n\n")[1] == "**Used by**  \n[b](#/b)  \n[a](#/a)"
    assert text.with_use(twice, "") == page


def test_many_users_are_counted_and_all_of_them_linked():
    use = text.used_by([f"u{i}" for i in range(30)], "[all](#/all)")
    assert use.startswith("**Used by** [all](#/all)")
    assert use.endswith("and 10 more")
    assert text.used_by([]) == ""


def test_brackets_in_a_name_do_not_end_its_link():
    assert text.link("a]b|c", "#/x") == r"[a\]b\|c](#/x)"


def test_lines_leave_out_what_is_empty():
    assert text.lines({"A": "1", "B": "", "C": "3"}) == "**A** 1  \n**C** 3"


def test_addresses_are_relative_and_quoted():
    pages = [
        mlflow_pages.run_page("1", "r", "a b.html"),
        mlflow_pages.model_page("1", "m"),
        mlflow_pages.version_page("a/b c", "2"),
        mlflow_pages.runs_of_dataset("1", "d"),
    ]
    for page in pages:
        assert page.startswith("#/")
        assert " " not in page
        assert "workflowType=machine_learning" in page
    assert "/artifacts/a%20b.html?" in pages[0]
    assert "/models/a%2Fb%20c/versions/2?" in pages[2]
