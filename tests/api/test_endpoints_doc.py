from make_endpoints_doc import PAGE, endpoints_page


def test_the_page_is_what_the_application_says():
    assert PAGE.read_text() == endpoints_page(), "run python scripts/make_endpoints_doc.py"
