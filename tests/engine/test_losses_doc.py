from make_losses_doc import PAGE, page


def test_the_page_is_what_the_registry_says():
    assert PAGE.read_text() == page(), "run python scripts/make_losses_doc.py"
