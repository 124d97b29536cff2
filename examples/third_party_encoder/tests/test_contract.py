from merv.testing import check_encoder


def test_contract():
    assert [str(finding) for finding in check_encoder("color_histogram") if not finding.passed] == []
