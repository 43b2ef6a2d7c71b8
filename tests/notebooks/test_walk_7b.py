"""The walks of test_walk.py with the profiles of Llama 2 7B: two files, one for each core."""

from tests.notebooks.test_walk import (  # noqa: F401
    curated,
    given,
    parameters,
    pytest_generate_tests,
    test_02_teaches_what_it_says,
    test_03_walks_and_teaches_what_it_says,
    test_every_recipe_walks_04_to_06,
)

PROFILES = ("article", "llama2_7b")
