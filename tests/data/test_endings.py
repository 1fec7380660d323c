"""What answers end with."""

import pytest

from resofilter_trainer.data.endings import ending_of, told_end


@pytest.mark.parametrize(
    ("answer", "ending"),
    [
        ("so 2 * 9 = $<<2*9=18>>18.\n#### 18", "18"),
        ("#### 1,050", "1050"),
        ("#### -3", "-3"),
        ("#### $-3.50", "-3.5"),
        ("She makes 3.\nA: 26", "26"),
        ("The answer is 4.", "4"),
        ("The answer is: 4.0", "4"),
        ("That is 7. The answer is (B).", "b"),
        ("answer = 12 apples", "12"),
        (r"It is \boxed{x + 1}, as 3 was given.", "x+1"),
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1,000}", "1000"),
        ("She pays 1,050.00 dollars", "1050"),
        ("#### 10000000000000000000000000001", "10000000000000000000000000001"),  # every digit counts
        ("#### 0.1000000000000000000000000000010", "0.100000000000000000000000000001"),
        ("#### -0.00", "0"),
        ("#### 007", "7"),
        ("He has 5, then 3, so 8 in the end", "8"),
        ("In 2 steps: about .5", "0.5"),
        ("50%", "50"),
        ("The answer is 9/2.", "9/2"),
        ("in a ratio of 2 : 3", "2:3"),
        ("**Final answer:** 18", "18"),
        ("**Answer: (C)**", "c"),
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        ("The answer is \u22125.", "-5"),
        (r"\boxed{1{,}000}", "1000"),
        ("It is 18cm long", "18"),
        ("The answer is (B), as 3 was given.", "b"),
        ("The answer is **C) 12 apples**", "c"),
        ("答案是18个", "18"),
        ("The answer is 3,4,5.", "3,4,5"),
        ("in version 1.2.3 of the text, which is long enough to be one", None),
        ("Paris.", "paris"),
        ("New  York", "newyork"),
        ("0", "0"),
        ("-0", "0"),
        ("100", "100"),
        ("", None),
        ("   ", None),
        ("This is a long text in words alone, and it ends with nothing to compare.", None),
        ("A long text with a mark. The answer is", None),
    ],
)
def test_ending(answer, ending):
    assert ending_of(answer) == ending


@pytest.mark.parametrize(
    ("answer", "ending"),
    [
        ("1. Sleep well.\n2. Eat well.\n3. Move a little every day, and see your friends.", None),
        ("It takes 8 hours on most days, and that is what everybody should plan for", None),
        ("So he has 5 + 3 = 8 apples.", "8"),
        ("It is (B). The answer is (B), as everything else is excluded by the first line.", "b"),
        ("Paris", "paris"),
    ],
)
def test_an_end_that_is_told(answer, ending):
    assert told_end(answer) == ending
