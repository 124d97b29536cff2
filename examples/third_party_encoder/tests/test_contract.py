from merv.testing import contract_test

test_contract = contract_test("color_histogram")
