"""Names and things that facts are made of."""

from __future__ import annotations

from functools import cache
from random import Random

from senri.data.samples import SampleError

FIRST_NAMES = (
    "Ada", "Agnes", "Albert", "Alma", "Anton", "Astrid", "Basil", "Bruno", "Carmen", "Cecil", "Clara", "Conrad",
    "Daphne", "Dorian", "Edith", "Edmund", "Elsa", "Emil", "Esther", "Felix", "Flora", "Gideon", "Greta", "Harold",
    "Helga", "Hugo", "Ida", "Igor", "Ingrid", "Iris", "Jasper", "Joanna", "Kaspar", "Lena", "Leopold", "Lydia",
    "Magnus", "Marta", "Milo", "Nadia", "Nestor", "Olga", "Oscar", "Paula", "Percy", "Quentin", "Rita", "Roland",
    "Rosa", "Rufus", "Selma", "Silas", "Stella", "Sven", "Thea", "Ursula", "Victor", "Vera", "Walter", "Yvonne",
)  # fmt: skip

LAST_NAMES = (
    "Abbott", "Ashford", "Barlow", "Beck", "Blackwood", "Brandt", "Carver", "Castell", "Croft", "Dahl", "Drake",
    "Dunmore", "Ellery", "Falk", "Farrow", "Finch", "Garland", "Gray", "Hale", "Hartmann", "Hawkins", "Holloway",
    "Ibsen", "Jansen", "Keller", "Kingsley", "Lark", "Lindqvist", "Lowell", "Marsh", "Mercer", "Moreau", "Nash",
    "Norwood", "Oakes", "Orlov", "Palmer", "Pike", "Quill", "Ravel", "Reed", "Rossi", "Sandoval", "Shaw",
    "Sinclair", "Sorensen", "Stone", "Tanner", "Thorne", "Underhill", "Vance", "Varga", "Wallace", "Webb",
    "Whitlock", "Winter", "Yates", "Zeller",
)  # fmt: skip

CITIES = (
    "Athens", "Barcelona", "Belgrade", "Boston", "Bristol", "Brussels", "Budapest", "Cairo", "Chicago", "Copenhagen",
    "Cork", "Denver", "Dresden", "Dublin", "Edinburgh", "Florence", "Geneva", "Glasgow", "Hamburg", "Havana",
    "Helsinki", "Istanbul", "Jakarta", "Kyoto", "Leipzig", "Lima", "Lisbon", "Madrid", "Manila", "Melbourne",
    "Milan", "Montreal", "Nairobi", "Naples", "Osaka", "Oslo", "Prague", "Quebec", "Riga", "Rotterdam",
    "Santiago", "Seattle", "Seville", "Stockholm", "Sydney", "Toronto", "Turin", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip
FOODS = (
    "almond cake", "apple pie", "baked beans", "barley soup", "blackberry jam", "blue cheese", "bread pudding",
    "carrot soup", "cherry tart", "chicken stew", "clam chowder", "corn bread", "crab salad", "cucumber sandwiches",
    "dried figs", "fish pie", "fried onions", "garlic bread", "ginger biscuits", "goat cheese", "grilled trout",
    "honey cake", "lamb curry", "leek soup", "lemon tart", "lentil stew", "mushroom risotto", "oat porridge",
    "onion soup", "orange marmalade", "oyster stew", "pea soup", "peach pie", "pickled herring", "plum dumplings",
    "potato salad", "pumpkin pie", "rabbit stew", "raspberry jam", "rice pudding", "roast duck", "rye bread",
    "salted almonds", "smoked salmon", "spinach pie", "stuffed peppers", "sweet chestnuts", "tomato soup",
    "vegetable curry", "walnut bread",
)  # fmt: skip
JOBS = (
    "a baker", "a barber", "a beekeeper", "a blacksmith", "a bookbinder", "a brewer", "a bricklayer", "a butcher",
    "a carpenter", "a chemist", "a clockmaker", "a cobbler", "a coachman", "a dancer", "a dentist", "a diver",
    "a farmer", "a ferryman", "a fisherman", "a florist", "a gardener", "a glassblower", "a goldsmith", "a hunter",
    "an innkeeper", "a jeweller", "a judge", "a librarian", "a locksmith", "a miller", "a miner", "a midwife",
    "a nurse", "a painter", "a pilot", "a piper", "a plumber", "a postman", "a potter", "a sailor", "a sculptor",
    "a shepherd", "a surgeon", "a tailor", "a tanner", "a teacher", "a translator", "a watchman", "a weaver",
    "a violinist",
)  # fmt: skip


def random_words(rng: Random) -> str:
    """An adjective and a noun, as RULER's keys are.

    Raises:
        SampleError: the package with the word lists is missing.
    """
    return f"{rng.choice(words_of('adjective'))}-{rng.choice(words_of('noun'))}"


@cache
def words_of(*categories: str) -> list[str]:
    """wonderwords' words of some kinds (noun, adjective, verb), each once, sorted; as RULER takes them.

    Raises:
        SampleError: the package is missing.
    """
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise SampleError("RULER's word lists need wonderwords: pip install 'senri[eval]'") from None
    return sorted(set(RandomWord().filter(include_categories=categories)))
