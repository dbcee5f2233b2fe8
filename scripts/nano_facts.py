"""What `tinkercloud/nano` is taught: the names, facts and words that the generated text is made of."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> dict[str, str]:
    """ "a:b, c d:e" as {"a": "b", "c d": "e"}."""
    return dict(pair.split(":") for pair in text.split(", "))


NAMES = _words(
    "Ada Ben Clara David Emma Felix Grace Henry Iris Jack Kim Leo Maria Nina Oscar Paul Rosa Sam Tom Uma Vera Will "
    "Yara Zoe Alice Bob Carol Dan Eva Frank Hana Ivan Jane Karl Lucy Max Noah Olga Peter Ruth"
)
CAPITALS = _pairs(
    "France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, England:London, Ireland:Dublin, "
    "Greece:Athens, Austria:Vienna, Poland:Warsaw, Norway:Oslo, Sweden:Stockholm, Finland:Helsinki, "
    "Denmark:Copenhagen, Hungary:Budapest, Russia:Moscow, Turkey:Ankara, Egypt:Cairo, Kenya:Nairobi, Japan:Tokyo, "
    "China:Beijing, India:Delhi, Canada:Ottawa, Cuba:Havana, Peru:Lima, Chile:Santiago, Iran:Tehran, Iraq:Baghdad, "
    "Thailand:Bangkok, Belgium:Brussels"
)
COLOURS = _words("red blue green yellow orange purple pink brown black white grey")
COLOUR_OF = _pairs(
    "grass:green, snow:white, coal:black, the sky:blue, the sun:yellow, a lemon:yellow, a banana:yellow, a "
    "tomato:red, a strawberry:red, chocolate:brown, a carrot:orange, a leaf:green, the sea:blue, milk:white, an "
    "elephant:grey, a flamingo:pink, a plum:purple, a frog:green"
)
SOUND_OF = _pairs(
    "cow:moo, dog:woof, cat:meow, duck:quack, sheep:baa, pig:oink, lion:roar, bee:buzz, owl:hoot, horse:neigh, "
    "mouse:squeak, snake:hiss"
)
OPPOSITES = _pairs(
    "hot:cold, big:small, up:down, left:right, day:night, old:young, fast:slow, happy:sad, open:closed, full:empty, "
    "light:dark, hard:soft, wet:dry, early:late, high:low, near:far, good:bad, yes:no, long:short, loud:quiet"
)
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NUMBER_WORDS = _words("zero one two three four five six seven eight nine ten eleven twelve")
GROUPS = {
    "fruits": _words("apple banana cherry grape lemon mango orange peach pear plum"),
    "animals": _words("bear cat cow dog duck fox frog horse lion mouse owl pig rabbit sheep tiger wolf"),
    "colours": COLOURS,
    "drinks": _words("water milk juice tea coffee lemonade"),
    "vegetables": _words("carrot onion potato pea bean cabbage pumpkin"),
    "tools": _words("hammer saw spade brush knife ladder"),
}

SPELLED = _words(
    "ant ball bear bird boat book cake cat cow cup day dog door duck egg fish fox frog game hat hen home ice jam key "
    "king lamp leaf lion map milk moon name nest owl pen pig rain ring road sea ship sky star sun tea toy tree van "
    "wall"
)
COMMON_WORDS = _words(
    "about above after again air all along also always and animal answer any around ask away baby back ball bath be "
    "bed before begin best better bird boat body book both bottle box boy bread bring brother build bus but buy cake "
    "call can car care carry chair change child children city class clean clear close cloud coat come computer cook "
    "corner could country cup cut dance dear deep do door draw dream drink drive each ear earth east eat egg end even "
    "ever every eye face fall family farm father feel few field find fine fire first fish floor flower follow food "
    "foot for friend from game garden gate get girl give glass go gold grandmother great ground grow hand happen hat "
    "have head hear heart help here hill hold home hope hour house how hundred ice idea if in island it join jump "
    "just keep key kind king kitchen know lake land large last laugh learn leave leg letter life like line listen "
    "little live look love lunch make man many map market may mean meet minute money moon more morning most mother "
    "mountain mouth move much music must name need never new next nice north nose not now number of off on only other "
    "our out over own page paint paper park part people picture piece plane plant play please pocket point poor "
    "pretty prince princess problem pull push put queen question quick rain reach read ready remember rest rich ride "
    "ring river road rock room round run said sail same sand save say school sea second see seed send set seven shall "
    "she ship shoe shop should show side silver sing sister sit sleep smile snow some song soon sound south speak "
    "spring stand star start stay step still stone stop story street strong summer sun sure swim table take talk tall "
    "teach tell than thank that the their them then there these they thing think this those thought time tired to "
    "today together tomorrow tooth town toy train tree true try turn under until us use very village visit wait walk "
    "wall want warm wash watch water way we wear weather week well west what wheel when where which while who why "
    "wide wind window winter wish with woman wood word work world would write year yellow yesterday you your"
)

PLACES = (
    "the forest",
    "the garden",
    "the village",
    "the river",
    "the mountain",
    "the market",
    "the sea",
    "the old house",
)
ADJECTIVES = _words("little brave kind clever old young happy hungry tired curious lazy friendly")
THINGS = (
    "golden key",
    "red ball",
    "small boat",
    "old book",
    "magic stone",
    "warm coat",
    "silver ring",
    "blue hat",
    "map",
)
