"""Forty prompts of many kinds, ours; some long enough to fill several batches."""

from __future__ import annotations

_STORY = (
    "The lighthouse keeper counted the waves every morning, because his grandfather had told him that the sea forgets "
    "nothing. On the ninth day of the storm a small boat appeared, carrying a cat, a violin and a letter. "
)
_REPORT = (
    "The pump in building four stopped at 02:14. The night shift restarted it twice and found the inlet filter clogged "
    "with algae. After cleaning, the flow returned to 38 litres per minute. Maintenance recommends a weekly check. "
)

PROMPTS = [
    "Name three rivers of France.",
    "Explain in two sentences why the sky is blue.",
    "What is 17 times 6? Show the steps.",
    "Translate to French: The train leaves at nine.",
    "Write a haiku about rain on a tin roof.",
    "Give me a recipe for pancakes without eggs.",
    "Is a tomato a fruit or a vegetable?",
    "Write a Python function that reverses a string.",
    "Continue the list: apple, banana, cherry,",
    "What should I pack for a winter hike?",
    "Who wrote Romeo and Juliet, and when?",
    "Repeat exactly: the quick brown fox jumps over the lazy dog.",
    "Count from one to thirty in words.",
    "List the planets from the sun outwards.",
    "Correct the spelling: I recieved teh mesage yesturday.",
    "Describe a sunset to someone who cannot see.",
    "A bag has 3 red and 5 blue marbles. What is the chance of red?",
    "Write an email asking a neighbour to turn the music down.",
    "What does HTTP status 404 mean?",
    "Tell me a joke about computers.",
    "Summarise: " + _STORY,
    "Summarise in one line: " + _REPORT,
    "Rewrite politely: Send me the file now.",
    "Give five synonyms of happy.",
    "Why do cats purr?",
    "Write SQL that counts orders per customer.",
    "What is the capital of Australia?",
    "Make a plan for learning to swim in four weeks.",
    "Explain photosynthesis to a child.",
    "Convert 72 degrees Fahrenheit to Celsius.",
    "Write the first paragraph of a mystery set in a bakery.",
    "asdf qwer zxcv 12345 !!! ???",
    "Was ist die Hauptstadt von Deutschland?",
    "¿Cómo se dice 'good morning' en español?",
    '{"task": "classify", "text": "great product", "labels": ["positive", "negative"]}',
    "Write a limerick about a robot.",
    "Explain what a hash table is and when it is slow.",
    "What happened next? " + _STORY * 3,
    "List every action that was taken. " + _REPORT * 6,
    "Write an ending for this. " + _STORY * 12,
]
