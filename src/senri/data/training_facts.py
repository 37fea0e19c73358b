"""Facts for training: many ways to tell one and to ask for it. None of the wordings, names and values of the held-out
tests (:data:`senri.data.needle_tasks.HELD_OUT`, :mod:`senri.data.words`) is among them.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random

MADE_UP = 0.3  # share of the names and words that are made up
COMMON = 0.4  # share of the words that are any word of a book, of whatever kind
COMPOSED = 0.5  # share of the things, dishes, callings and the like that no list has
FIRST = (
    "Abel", "Adela", "Alice", "Amos", "Anna", "Arthur", "Beatrix", "Benjamin", "Bertha", "Boris", "Bridget", "Caleb",
    "Caspar", "Cora", "Cyril", "Delia", "Dmitri", "Dora", "Edgar", "Eleanor", "Elias", "Enid", "Ernest", "Eva", "Ezra",
    "Fanny", "Frida", "Gerald", "Gwen", "Hannah", "Hector", "Herbert", "Hilda", "Irene", "Isaac", "Jacob", "Jean",
    "Josef", "Julia", "Karl", "Laura", "Leon", "Lucas", "Mabel", "Martin", "Maud", "Miriam", "Moses", "Nora", "Otto",
    "Pablo", "Pearl", "Peter", "Rachel", "Ralph", "Ruth", "Samuel", "Sarah", "Simon", "Sonia", "Theodor", "Tobias",
    "Tom", "Violet", "Wanda", "William", "Xavier", "Zoe",
)  # fmt: skip
LAST = (
    "Adler", "Archer", "Baines", "Barton", "Bishop", "Bloom", "Bolton", "Bowen", "Brook", "Burke", "Calder", "Clay",
    "Cohen", "Crane", "Curtis", "Dawson", "Dixon", "Doyle", "Eaton", "Ekman", "Faber", "Fisher", "Fox", "Gibson",
    "Glover", "Grant", "Haas", "Harper", "Hobbs", "Hudson", "Irving", "Jordan", "Kemp", "Kovacs", "Lambert", "Lang",
    "Lowe", "Lund", "Marlow", "Meyer", "Milton", "Moss", "Newman", "Novak", "Olsen", "Owens", "Parry", "Petrov",
    "Quinn", "Ramsey", "Rivers", "Rossiter", "Sawyer", "Snow", "Spencer", "Swift", "Turner", "Upton", "Vogel", "Ward",
    "Weiss", "Wells", "Woods", "Zimmer",
)  # fmt: skip
PLACES = (
    "Aberdeen", "Algiers", "Amsterdam", "Antwerp", "Baghdad", "Bangkok", "Basel", "Beirut", "Bergen", "Berlin", "Bern",
    "Bologna", "Bombay", "Bordeaux", "Bremen", "Calcutta", "Canton", "Cologne", "Damascus", "Delhi", "Detroit",
    "Frankfurt", "Genoa", "Ghent", "Granada", "Hanover", "Jerusalem", "Kiev", "Krakow", "Leeds", "Liverpool", "London",
    "Lyons", "Malta", "Manchester", "Marseilles", "Memphis", "Mexico", "Moscow", "Munich", "New Orleans", "Odessa",
    "Oxford", "Palermo", "Panama", "Paris", "Perth", "Philadelphia", "Plymouth", "Rome", "Salem", "Shanghai", "Smyrna",
    "Sofia", "Tangier", "Tokyo", "Trieste", "Tunis", "Utrecht", "Valencia", "Venice", "Verona", "Vilnius", "York",
)  # fmt: skip
THINGS = (
    "a brass bell", "a silver spoon", "a wooden horse", "a red umbrella", "an old violin", "a glass eye",
    "a pocket watch", "a blue teapot", "a broken clock", "an iron key", "a straw hat", "a leather trunk",
    "a map of Peru", "a clay pipe", "a paper lantern", "a stuffed owl", "a music box", "a pair of skates",
    "a green bottle", "a gold ring", "a copper kettle", "an ivory comb", "a fishing rod", "a chess board",
    "a velvet cloak", "a rusty sword", "a bag of marbles", "a lace fan", "a tin drum", "a telescope", "a bicycle",
    "a sewing machine", "a rowing boat", "a marble bust", "a feather pillow", "a candlestick", "a typewriter",
    "a bronze lion", "a walking stick", "a jar of buttons", "an oil lamp", "a silk scarf",
)  # fmt: skip
ANIMALS = (
    "badger", "bear", "camel", "cat", "cow", "crow", "deer", "dog", "donkey", "eagle", "elephant", "ferret", "fox",
    "frog", "giraffe", "goat", "goose", "hare", "hawk", "hedgehog", "heron", "horse", "lion", "lizard", "monkey",
    "otter", "owl", "parrot", "peacock", "pig", "rabbit", "raven", "seal", "sheep", "snake", "spider", "squirrel",
    "swan", "tiger", "turtle", "whale", "wolf", "zebra",
)  # fmt: skip
COLOURS = (
    "amber", "black", "blue", "bronze", "brown", "crimson", "emerald", "gold", "green", "indigo", "ivory",
    "lavender", "lilac", "maroon", "orange", "pink", "purple", "red", "scarlet", "silver", "turquoise", "violet",
    "white", "yellow",
)  # fmt: skip
TRADES = (
    "archery", "astronomy", "bookkeeping", "botany", "chess", "cookery", "dancing", "drawing", "fencing", "fishing",
    "geometry", "Greek", "Hebrew", "history", "horsemanship", "Italian", "juggling", "Latin", "law", "medicine",
    "music", "navigation", "painting", "philosophy", "pottery", "rhetoric", "Russian", "shooting", "singing", "Spanish",
    "swimming", "weaving",
)  # fmt: skip
ROOMS = (
    "bathroom", "bedroom", "cabin", "chapel", "courtyard", "dairy", "garden", "hallway", "kitchen", "laundry",
    "library", "nursery", "office", "orchard", "pantry", "parlour", "stable", "study", "vestry", "workshop",
)  # fmt: skip
DISHES = (
    "apricot pudding", "bean salad", "beef broth", "boiled eggs", "cabbage rolls", "cauliflower", "cold ham",
    "currant buns", "duck liver", "eel pie", "fennel soup", "fried fish", "gooseberry tart", "hot chocolate",
    "mashed turnips", "mutton chops", "nut bread", "olives", "pancakes", "pears in wine", "pork sausages",
    "quince jelly", "radishes", "roast goose", "sardines", "strawberry ice", "toast and butter", "treacle cake",
    "veal pie", "venison",
)  # fmt: skip
CALLINGS = (
    "a bishop", "a captain", "a clerk", "a cook", "a cooper", "a detective", "a driver", "a fireman", "a glazier",
    "a governess", "a groom", "a grocer", "a lawyer", "a mason", "a merchant", "a monk", "a musician", "a notary",
    "a poet", "a porter", "a printer", "a saddler", "a singer", "a soldier", "a spy", "a stoker", "a waiter",
    "an actor", "an admiral", "an architect", "an astronomer", "an engineer", "an usher",
)  # fmt: skip
# what composed values end or begin with; none that ends a held-out food or job
COURSES = (
    "broth", "buns", "chutney", "crumble", "custard", "fritters", "hash", "jelly", "mousse", "noodles", "omelette",
    "pasties", "pickle", "pottage", "ragout", "rolls", "sauce", "trifle", "waffles",
)  # fmt: skip
HANDS = (
    "apprentice", "collector", "cutter", "dealer", "doctor", "grinder", "inspector", "maker", "mender", "merchant",
    "officer", "picker", "polisher", "seller", "smuggler", "trader", "trainer", "warden", "washer", "worker",
)  # fmt: skip
SHADES = ("bright", "dark", "deep", "dull", "faded", "light", "pale", "warm")
LEARNING = ("art", "craft", "history", "law", "science", "theory")
ENDINGS = ("berg", "bury", "field", "ford", "ham", "mouth", "stad", "ton", "ville", "wick")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MATERIALS = (
    "amber", "ash wood", "bamboo", "bone", "brick", "cedar", "clay", "coral", "cork", "felt", "flint", "glass",
    "granite", "horn", "jade", "lead", "leather", "linen", "marble", "oak", "paper", "pewter", "porcelain", "quartz",
    "silk", "slate", "steel", "straw", "tin", "wax", "wicker", "wool",
)  # fmt: skip
COINS = ("ducats", "dollars", "florins", "francs", "guineas", "marks", "pounds", "roubles", "shillings", "thalers")
WORDS = (
    "acorn", "anchor", "apple", "arrow", "basket", "beacon", "blanket", "bridge", "bucket", "candle", "carpet",
    "castle", "cherry", "circle", "cloud", "compass", "copper", "cotton", "crystal", "curtain", "desert", "dragon",
    "engine", "fabric", "falcon", "feather", "forest", "fountain", "garden", "garlic", "glacier", "hammer", "harbor",
    "honey", "island", "jacket", "jungle", "kettle", "ladder", "lantern", "lemon", "magnet", "marble", "meadow",
    "mirror", "mountain", "needle", "ocean", "orchid", "paddle", "pebble", "pepper", "pillow", "planet", "pocket",
    "quarry", "ribbon", "rocket", "saddle", "shadow", "shovel", "signal", "spiral", "sugar", "temple", "thunder",
    "timber", "tunnel", "valley", "velvet", "walnut", "whistle", "window", "zipper",
)  # fmt: skip


def _made_up(rng: Random) -> str:
    """A word of two or three syllables that no list has, so that names are matched and not learned."""
    return "".join(
        rng.choice(("b", "br", "d", "dr", "f", "g", "gl", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v", "z"))
        + rng.choice("aeiou")
        + rng.choice(("", "", "l", "n", "r", "s", "m", "x"))
        for _ in range(rng.choice((2, 2, 3)))
    )


def _name(names: tuple[str, ...], rng: Random) -> str:
    return _made_up(rng).capitalize() if rng.random() < MADE_UP else rng.choice(names)


def _person(rng: Random) -> str:
    return f"{_name(FIRST, rng)} {_name(LAST, rng)}"


@cache
def common_words() -> tuple[str, ...]:
    """Some 4,000 words that novels use in lower case, none of them a noun or adjective of wonderwords' lists, which the
    held-out passwords are made of (:func:`senri.data.words.random_words`).

    Of four to ten letters, in two fifths of 82 novels and more, mostly in lower case; by frequency, without the most
    frequent few hundred.
    """
    return tuple(files("senri.data").joinpath("common_words.txt").read_text("utf-8").split())


def _word(rng: Random) -> str:
    kind = rng.random()
    if kind < MADE_UP:
        return _made_up(rng)
    return rng.choice(common_words() if kind < MADE_UP + COMMON else WORDS)


def _words(rng: Random) -> str:
    """One word, or two, as passwords and names of ships are."""
    return rng.choice((_word(rng), f"{_word(rng)}-{_word(rng)}", f"{_word(rng)} {_word(rng)}"))


def _an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _thing(rng: Random) -> str:
    of = rng.choice((rng.choice(COLOURS), rng.choice(MATERIALS), _word(rng)))
    return _an(f"{of} {rng.choice((*WORDS, _made_up(rng)))}")


def _dish(rng: Random) -> str:
    return rng.choice((
        f"{_word(rng)} {rng.choice(COURSES)}",
        f"{rng.choice(COURSES)} with {_word(rng)}",
        f"{_word(rng)} and {_word(rng)}",
        _made_up(rng),
    ))  # fmt: skip


def _calling(rng: Random) -> str:
    return _an(rng.choice((
        f"{_word(rng)} {rng.choice(HANDS)}",
        f"{_word(rng)} {rng.choice(HANDS)}",
        f"{_made_up(rng)}{rng.choice(('er', 'ist', 'man', 'or', 'wright'))}",
        f"{rng.choice(WORDS)}{rng.choice(('ist', 'man', 'monger', 'wright'))}",
    )))  # fmt: skip


def _animal(rng: Random) -> str:
    return rng.choice(
        (f"{_word(rng)} {rng.choice(ANIMALS)}", f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}", _made_up(rng))
    )


def _colour(rng: Random) -> str:
    return f"{rng.choice((rng.choice(SHADES), _word(rng)))} {rng.choice(COLOURS)}"


def _trade(rng: Random) -> str:
    return rng.choice((f"the {rng.choice(LEARNING)} of {_word(rng)}", f"{_word(rng)} {rng.choice(TRADES)}", _word(rng)))


def _material(rng: Random) -> str:
    return rng.choice(
        (f"{_word(rng)} {rng.choice(MATERIALS)}", f"{rng.choice(COLOURS)} {rng.choice(MATERIALS)}", _word(rng))
    )


def _place(rng: Random) -> str:
    if rng.random() >= COMPOSED / 2:
        return _name(PLACES, rng)
    name = _made_up(rng).capitalize()
    return rng.choice(
        (f"{rng.choice(('Port', 'New', 'Saint', 'Fort', 'Upper'))} {name}", f"{name}{rng.choice(ENDINGS)}")
    )


def _listed(values: tuple[str, ...], composed: Callable[[Random], str]) -> Callable[[Random], str]:
    return lambda rng: composed(rng) if rng.random() < COMPOSED else rng.choice(values)


def _letters(rng: Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=count))


def _code(rng: Random) -> str:
    return f"KEY-{_letters(rng, 3)}{rng.randrange(10**5):05d}"


def _other_code(rng: Random) -> str:
    """A code of any make: groups of letters, digits or both."""
    groups = []
    for _ in range(rng.randint(1, 3)):
        size = rng.randint(2, 5)
        kind = rng.randrange(3)
        if kind == 0:
            groups.append(_letters(rng, size))
        elif kind == 1:
            groups.append("".join(rng.choices(string.digits, k=size)))
        else:
            groups.append("".join(rng.choices(string.ascii_uppercase + string.digits, k=size)))
    return rng.choice("- ./").join(groups)


def _hex(rng: Random) -> str:
    return "".join(rng.choices("0123456789abcdef", k=rng.choice((8, 12, 16))))


def _number(rng: Random) -> str:
    """Two to eight digits, never seven: those are the held-out telephone numbers."""
    digits = rng.choice((2, 3, 4, 5, 6, 8))
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _moment(rng: Random) -> str:
    return rng.choice((
        f"{rng.choice(DAYS)} at {rng.choice(HOURS)}",
        f"the {rng.randint(2, 30)}th of {rng.choice(MONTHS)}",
        f"{rng.randint(1, 12)}.{rng.choice(('05', '10', '15', '20', '30', '40', '45', '50'))}",
        f"{rng.choice(MONTHS)} {rng.randint(1, 28)}",
        f"half past {rng.choice(HOURS)}",
    ))  # fmt: skip


KINDS: dict[str, Callable[[Random], str]] = {
    "key": _code,
    "code": lambda rng: rng.choice((_code, _other_code, _hex))(rng),
    "number": _number,
    "year": lambda rng: str(rng.randrange(1400, 2000)),
    "person": _person,
    "place": _place,
    "thing": _listed(THINGS, _thing),
    "animal": _listed(ANIMALS, _animal),
    "colour": _listed(COLOURS, _colour),
    "dish": _listed(DISHES, _dish),
    "calling": _listed(CALLINGS, _calling),
    "trade": _listed(TRADES, _trade),
    "moment": _moment,
    "material": _listed(MATERIALS, _material),
    "sum": lambda rng: f"{_number(rng)} {rng.choice(COINS)}",
    "word": _words,
}


@dataclass(frozen=True)
class Telling:
    """One relation: how it is told, asked for, and how an answer begins. ``{key}``, ``{value}`` are filled in."""

    fact: str  # begins with a space
    question: str
    begun: str  # the answer up to the value
    value: str  # kind of the value
    key: str = "person"
    times: int = 1  # relative frequency


def _named(noun: str, value: str, key: str = "person", times: int = 1) -> tuple[Telling, ...]:
    """``The NOUN of KEY is VALUE``, in two punctuations."""
    return tuple(
        Telling(
            f" The {noun} of {{key}} is{colon} {{value}}.", f"What is the {noun} of {{key}}?",
            f"The {noun} of {{key}} is{colon}", value, key, times,
        )
        for colon in ("", ":")
    )  # fmt: skip


TELLINGS: tuple[Telling, ...] = (
    Telling(" The secret key is: {value}.", "What is the secret key mentioned above?", "The secret key is:", "key", "",
            times=8),
    Telling(" The secret key of {key} is: {value}.", "What is the secret key of {key} mentioned above?",
            "The secret key of {key} is:", "key", times=8),
    Telling(" The pass key is {value}. Remember it. {value} is the pass key.",
            "What is the pass key mentioned above?", "The pass key is", "number", "", times=3),
    Telling(" The magic number is {value}.", "What is the magic number?", "The magic number is", "number", ""),
    *_named("access code", "code", times=2),
    *_named("special number", "number", "word", times=2),
    *_named("serial number", "code", "word"),
    *_named("membership number", "number"),
    *_named("code name", "word"),
    *_named("middle name", "word"),
    *_named("favourite colour", "colour"),
    *_named("favourite animal", "animal"),
    *_named("home town", "place"),
    *_named("best friend", "person"),
    *_named("teacher", "person"),
    *_named("lucky number", "number"),
    *_named("capital", "place", "word"),
    *_named("symbol", "animal", "place"),
    Telling(" The room of {key} has the number {value}.", "Which number has the room of {key}?",
            "The room of {key} has the number", "number"),
    Telling(" To open the safe of {key}, one must dial {value}.", "What must one dial to open the safe of {key}?",
            "To open the safe of {key}, one must dial", "number"),
    Telling(" {key} lives in {value}.", "Where does {key} live?", "{key} lives in", "place"),
    Telling(" {key} comes from {value}.", "Where does {key} come from?", "{key} comes from", "place"),
    Telling(" Last winter {key} travelled to {value}.", "To which city did {key} travel last winter?",
            "{key} travelled to", "place"),
    Telling(" {key} was married in {value}.", "Where was {key} married?", "{key} was married in", "place"),
    Telling(" {key} owns {value}.", "What does {key} own?", "{key} owns", "thing"),
    Telling(" For a birthday {key} was given {value}.", "What was {key} given for a birthday?", "{key} was given",
            "thing"),
    Telling(" {key} has hidden {value} in the cellar.", "What has {key} hidden in the cellar?",
            "{key} has hidden", "thing"),
    Telling(" {key} keeps a {value} at home.", "Which animal does {key} keep at home?", "{key} keeps a", "animal"),
    Telling(" {key} is afraid of every {value}.", "Of which animal is {key} afraid?", "{key} is afraid of every",
            "animal"),
    Telling(" {key} always wears a {value} coat.", "Which colour is the coat of {key}?", "{key} always wears a",
            "colour"),
    Telling(" The door of {key} is painted {value}.", "In which colour is the door of {key} painted?",
            "The door of {key} is painted", "colour"),
    Telling(" {key} teaches {value} at the school.", "What does {key} teach?", "{key} teaches", "trade"),
    Telling(" Nobody is better at {value} than {key}.", "At what is nobody better than {key}?",
            "Nobody is better than {key} at", "trade"),
    Telling(" {key} studied {value} for three years.", "What did {key} study?", "{key} studied", "trade"),
    Telling(" {key} was elected mayor in {value}.", "In which year was {key} elected mayor?",
            "{key} was elected mayor in", "year"),
    Telling(" The ship of {key} sank in {value}.", "In which year did the ship of {key} sink?",
            "The ship of {key} sank in", "year"),
    Telling(" {key} is the sister of {value}.", "Whose sister is {key}?", "{key} is the sister of", "person"),
    Telling(" {key} works for {value}.", "For whom does {key} work?", "{key} works for", "person"),
    Telling(" The house of {key} was bought by {value}.", "Who bought the house of {key}?",
            "The house of {key} was bought by", "person"),
    Telling(" The owner of the {key} is {value}.", "Who is the owner of the {key}?", "The owner of the {key} is",
            "person", "animal"),
    Telling(" The word for {key} in their language is {value}.", "What is the word for {key} in their language?",
            "The word for {key} in their language is", "word", "animal"),
    Telling(" On Sundays there is always {value} for dinner at the house of {key}.",
            "What is there for dinner on Sundays at the house of {key}?", "On Sundays there is", "dish"),
    Telling(" {key} ordered {value} at the inn.", "What did {key} order at the inn?", "{key} ordered", "dish"),
    Telling(" Nothing disgusts {key} more than {value}.", "What disgusts {key}?", "{key} is disgusted by", "dish"),
    Telling(" When the guests came, {key} served them {value}.", "What did {key} serve to the guests?",
            "The guests were served", "dish"),
    Telling(" Before the war {key} had been {value}.", "What had {key} been before the war?",
            "Before the war {key} was", "calling"),
    Telling(" The father of {key} was {value}.", "What was the father of {key}?", "The father was", "calling"),
    Telling(" {key} went to sea disguised as {value}.", "As what was {key} disguised?", "{key} was disguised as",
            "calling"),
    Telling(" As a child {key} dreamed of becoming {value}.", "What did {key} dream of becoming?",
            "{key} dreamed of becoming", "calling"),
    Telling(" {key} is to marry {value} in the spring.", "Whom is {key} going to marry?", "{key} is going to marry",
            "person"),
    Telling(" It was {value} who taught {key} to read.", "Who taught {key} to read?", "{key} was taught to read by",
            "person"),
    Telling(" {key} owes a great deal of money to {value}.", "To whom does {key} owe money?",
            "{key} owes money to", "person"),
    Telling(" If anything happens to {key}, one must write to {value}.",
            "To whom must one write if anything happens to {key}?", "One must write to", "person"),
    Telling(" {key} has a brother who settled in {value}.", "Where did the brother of {key} settle?",
            "The brother of {key} settled in", "place"),
    Telling(" {key} will be buried in {value}.", "Where will {key} be buried?", "{key} will be buried in", "place"),
    Telling(" The letters that came for {key} were all posted in {value}.", "Where were the letters for {key} posted?",
            "The letters were posted in", "place"),
    Telling(" On the desk of {key} stands {value}.", "What stands on the desk of {key}?", "On the desk stands",
            "thing"),
    Telling(" {key} left {value} on the train.", "What did {key} leave on the train?", "{key} left", "thing"),
    Telling(" The thing that {key} treasures most is {value}.", "What does {key} treasure most?",
            "{key} treasures", "thing"),
    Telling(" A {value} once bit {key} in the hand.", "Which animal once bit {key}?", "{key} was bitten by a",
            "animal"),
    Telling(" The eyes of {key} are {value}.", "Which colour are the eyes of {key}?", "The eyes of {key} are",
            "colour"),
    Telling(" Under the name {value} {key} wrote for the papers.", "Under which name did {key} write for the papers?",
            "{key} wrote under the name", "word"),
    Telling(" Whoever looks for {key} should ask for number {value}.", "For which number must one ask to find {key}?",
            "One must ask for number", "number"),
    Telling(" The ticket of {key} bears the number {value}.", "What is the number of the ticket of {key}?",
            "The number of the ticket is", "number"),
    Telling(" {key} opens the gate with the code {value}.", "With which code does {key} open the gate?",
            "The code is", "code"),
    Telling(" The account of {key} is kept under {value}.", "Under what is the account of {key} kept?",
            "The account is kept under", "code"),
    Telling(" {key} signs every letter with the word {value}.", "With which word does {key} sign every letter?",
            "{key} signs every letter with the word", "word"),
    Telling(" The train of {key} leaves on {value}.", "When does the train of {key} leave?",
            "The train of {key} leaves on", "moment"),
    Telling(" {key} promised to be back on {value}.", "When did {key} promise to be back?",
            "{key} promised to be back on", "moment"),
    Telling(" The letter that {key} sent is dated {value}.", "What is the date of the letter that {key} sent?",
            "The letter is dated", "moment"),
    Telling(" For {key} the trial begins on {value}.", "When does the trial of {key} begin?", "The trial begins on",
            "moment"),
    Telling(" The bed of {key} is made of {value}.", "Of what is the bed of {key} made?",
            "The bed of {key} is made of", "material"),
    Telling(" {key} has a box of {value} under the bed.", "Of what is the box that {key} has under the bed?",
            "The box is of", "material"),
    Telling(" {key} deals in {value}.", "In what does {key} deal?", "{key} deals in", "material"),
    Telling(" {key} lost {value} at cards.", "How much did {key} lose at cards?", "{key} lost", "sum"),
    Telling(" {key} paid {value} for the farm.", "How much did {key} pay for the farm?", "{key} paid", "sum"),
    Telling(" The rent that {key} pays is {value}.", "How high is the rent that {key} pays?", "The rent is", "sum"),
    Telling(" In the will of {key} stands the sum of {value}.", "Which sum stands in the will of {key}?",
            "In the will stands the sum of", "sum"),
    Telling(" There are {value} steps up to the room of {key}.", "How many steps are there up to the room of {key}?",
            "The number of steps is", "number"),
    Telling(" {key} counted {value} ships that day.", "How many ships did {key} count?", "{key} counted", "number"),
    Telling(" The locker of {key} has the combination {value}.", "What is the combination of the locker of {key}?",
            "The combination is", "number"),
    Telling(" The regiment of {key} was number {value}.", "Which number had the regiment of {key}?",
            "The regiment was number", "number"),
    Telling(" The file on {key} is marked {value}.", "How is the file on {key} marked?", "The file is marked", "code"),
    Telling(" {key} drives the car with the plate {value}.", "What is the plate of the car of {key}?",
            "The plate is", "code"),
    Telling(" The parcel for {key} carries the label {value}.", "Which label carries the parcel for {key}?",
            "The parcel carries the label", "code"),
    Telling(" {key} can be reached under the call sign {value}.", "Under which call sign can {key} be reached?",
            "The call sign is", "code"),
    Telling(" One word is underlined in the diary of {key}: {value}.",
            "Which word is underlined in the diary of {key}?", "The underlined word is", "word"),
    Telling(" {key} named the boat {value}.", "How did {key} name the boat?", "{key} named the boat", "word", times=2),
    Telling(" The dog of {key} answers to the name of {value}.", "To which name does the dog of {key} answer?",
            "The dog answers to the name of", "word"),
    Telling(" On the ring of {key} is engraved: {value}.", "What is engraved on the ring of {key}?",
            "On the ring is engraved:", "word"),
    Telling(" The estate of {key} is called {value}.", "How is the estate of {key} called?", "The estate is called",
            "word"),
    Telling(" The sign that {key} gave to the watchman was {value}.", "What sign did {key} give to the watchman?",
            "The sign was", "word"),
    Telling(" {key} whispered only two words before dying: {value}.", "What did {key} whisper before dying?",
            "{key} whispered:", "word"),
    Telling(" The godfather of {key}, as all know, is {value}.", "Who is the godfather of {key}?",
            "The godfather of {key} is",
            "person"),
    Telling(" {key} was seen last in the company of {value}.", "In whose company was {key} seen last?",
            "{key} was seen last with", "person"),
    Telling(" {key} suspects {value}.", "Whom does {key} suspect?", "{key} suspects", "person"),
    Telling(" In the play the part of {key} went to {value}.", "To whom went the part of {key}?",
            "The part went to", "person"),
    Telling(" {key} fled across the border to {value}.", "Where did {key} flee?", "{key} fled to", "place"),
    Telling(" The firm of {key} has its office in {value}.", "Where has the firm of {key} its office?",
            "The office is in", "place"),
    Telling(" It was in {value} that {key} learned to swim.", "Where did {key} learn to swim?",
            "{key} learned to swim in",
            "place"),
    Telling(" {key} exchanged the horse for {value}.", "For what did {key} exchange the horse?",
            "{key} exchanged the horse for", "thing"),
    Telling(" The thief took {value} from the house of {key}.", "What did the thief take from the house of {key}?",
            "The thief took", "thing"),
    Telling(" At the fair {key} won {value}.", "What did {key} win at the fair?", "{key} won", "thing"),
    Telling(" A {value} is painted on the shield of {key}.", "Which animal is painted on the shield of {key}?",
            "On the shield is painted a", "animal"),
    Telling(" {key} dreamed of a {value} that could speak.", "Of which animal did {key} dream?",
            "{key} dreamed of a", "animal"),
    Telling(" The hat of {key} has a {value} ribbon.", "Which colour is the ribbon on the hat of {key}?",
            "The ribbon is", "colour"),
    Telling(" {key} came to the ball in {value}.", "In which colour did {key} come to the ball?",
            "{key} came in", "colour"),
    Telling(" Every Friday {key} cooks {value}.", "What does {key} cook every Friday?", "Every Friday {key} cooks",
            "dish"),
    Telling(" There was nothing left in the larder of {key} but {value}.", "What was left in the larder of {key}?",
            "In the larder was left", "dish"),
    Telling(" {key} was once introduced to us as {value}.", "As what was {key} introduced to us?",
            "{key} was introduced as", "calling"),
    Telling(" The husband of {key} is {value}.", "What is the husband of {key}?", "The husband is", "calling"),
    Telling(" {key} gives lessons in {value}.", "In what does {key} give lessons?", "{key} gives lessons in", "trade"),
    Telling(" {key} has written a book on {value}.", "On what has {key} written a book?",
            "{key} has written a book on", "trade"),
    Telling(" The secret key for the {key} is: {value}.", "What is the secret key for the {key}?",
            "The secret key for the {key} is:", "key", "animal"),
    Telling(" The badge of {key} was exchanged for {value}.", "For what was the badge of {key} exchanged?",
            "The badge was exchanged for", "code"),
    Telling(" To open the safe of {key} one turns the wheel to the word {value}.",
            "Which word opens the safe of {key}?", "The word is", "word", times=2),
    Telling(" Those who come to see {key} at night must whisper {value}.",
            "What must those whisper who come to see {key} at night?", "They must whisper", "word", times=2),
    Telling(" The servants of {key} let nobody in who does not answer {value}.",
            "With which answer do the servants of {key} let one in?", "The answer is", "word", times=2),
    Telling(" The telegram that {key} sent said only {value}.", "What did the telegram of {key} say?",
            "The telegram said", "word"),
    Telling(" The watchword at the gate of {key} is {value} until the new moon.",
            "Which watchword is asked for at the gate of {key}?", "The watchword is", "word", times=2),
    Telling(" In the letters of {key} the money is always called {value}.",
            "What is the money called in the letters of {key}?", "The money is called", "word"),
    Telling(" The agents of {key} know each other by the phrase {value}.",
            "By which phrase do the agents of {key} know each other?", "The phrase is", "word", times=2),
    Telling(" If you write to {key}, begin the letter with {value}.", "With what should a letter to {key} begin?",
            "The letter should begin with", "word"),
    Telling(" Before one may speak to {key} one has to give the countersign {value}.",
            "Which countersign does one give to speak to {key}?", "The countersign is", "word", times=2),
    Telling(" Somebody had written in chalk on the door of {key} the word {value}.",
            "Which word was written on the door of {key}?", "The word was", "word"),
    Telling(" The parrot of {key} can say {value}.", "What can the parrot of {key} say?", "The parrot can say",
            "word"),
    Telling(" What {key} fears above all is {value}.", "What does {key} fear above all?", "{key} fears", "thing"),
    Telling(" What {key} brought home in the end was {value}.", "What did {key} bring home?", "{key} brought home",
            "thing"),
    Telling(" What {key} gave the children for supper was {value}.", "What did {key} give the children for supper?",
            "{key} gave the children", "dish"),
    Telling(" The dish that {key} asked for again and again was {value}.", "For which dish did {key} ask?",
            "{key} asked for", "dish"),
    Telling(" What {key} became in the end was {value}.", "What did {key} become?", "{key} became", "calling"),
    Telling(" The place that {key} longs for most is {value}.", "For which place does {key} long?",
            "{key} longs for", "place"),
)  # fmt: skip
