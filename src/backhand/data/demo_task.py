"""The demo task: an order in a sentence becomes one line of strict JSON, always with the same keys in the same order.

    Ada Berg from Oslo ordered 12 blue lamps.
    {"name": "Ada Berg", "item": "blue lamps", "quantity": 12, "city": "Oslo"}

Everything is drawn from a seed. Held-out rows are made of other sentence patterns and other words: neither a pattern
nor a name, an item, a number or a city of theirs, nor any word of those, occurs in training. What has to be learned is
the form of the answer and which part of a sentence is which, not the words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from backhand.errors import ResourceError

SYSTEM = "JSON: name, item, quantity, city"
TRAIN_ROWS = 640
HELD_OUT_ROWS = 200
SHOTS = 3
ChatRow = dict[str, list[dict[str, Any]]]
"""One row in the form `messages`: system, user, assistant."""


def demo_rows(count: int, seed: int, *, held_out: bool = False) -> list[ChatRow]:
    """Rows with distinct sentences; the same seed gives the same rows.

    Args:
        held_out: from the patterns and words that training never sees.
    """
    words = HELD_OUT if held_out else TRAINING
    random = Random(f"backhand demo {'held out' if held_out else 'training'} {seed}")
    rows: dict[str, ChatRow] = {}
    while len(rows) < count:
        # Patterns take turns, so that each has its share of rows.
        pattern = words.patterns[len(rows) % len(words.patterns)]
        values = _draw(words, random)
        sentence = pattern.format(**values)
        rows[sentence] = _row(sentence, json.dumps(values))
    shuffled = list(rows.values())
    random.shuffle(shuffled)
    return shuffled


def few_shot(row: ChatRow, examples: Sequence[ChatRow]) -> ChatRow:
    """The row with the sentences and answers of `examples` as turns before its own."""
    system, *turns = row["messages"]
    shown = [{**message, **weight} for example in examples for message, weight in _as_context(example)]
    return {"messages": [system, *shown, *turns]}


def _as_context(row: ChatRow) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """The row's turns behind the system's; its answer is only shown, and carries no loss."""
    for message in row["messages"][1:]:
        yield message, {"weight": 0} if message["role"] == "assistant" else {}


def write_demo_data(
    folder: str | Path, *, seed: int = 0, train_rows: int = TRAIN_ROWS, held_out_rows: int = HELD_OUT_ROWS
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `valid.jsonl` into `folder`, which is made if it is not there.

    Raises:
        ResourceError: they cannot be written.
    """
    folder = Path(folder)
    paths = folder / "train.jsonl", folder / "valid.jsonl"
    sides = demo_rows(train_rows, seed), demo_rows(held_out_rows, seed, held_out=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, sides, strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise ResourceError("the demo's rows cannot be written", where=str(folder), why=str(error)) from None
    return paths


def _draw(words: DemoWords, random: Random) -> dict[str, Any]:
    return {
        "name": f"{random.choice(words.first_names)} {random.choice(words.last_names)}",
        "item": f"{random.choice(words.adjectives)} {random.choice(words.nouns)}",
        "quantity": random.choice(words.quantities),
        "city": random.choice(words.cities),
    }


def _row(sentence: str, answer: str) -> ChatRow:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": sentence},
            {"role": "assistant", "content": answer},
        ]
    }


# The words and sentence patterns of the demo task: one set to train on, another, sharing nothing with it, held out.
#
# The names and places to train on are many, and half of them made up, so that hardly any comes twice: a model that
# meets the same eighty cities over and over learns their spelling instead of learning to copy. And all words are such
# that SmolLM2's tokenizer cuts them alike behind a space, as they stand in a sentence, and behind a quotation mark, as
# they stand in the answer: ` Bristol` is one token and `Bristol` are three, so that copying it is an exercise in
# spelling, which is not what the demo is about.


@dataclass(frozen=True)
class DemoWords:
    """What sentences are made of. A person is a first and a last name, an item an adjective and a plural noun."""

    patterns: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    cities: tuple[str, ...]
    quantities: tuple[int, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


_HELD_OUT_LAST_DIGITS = (3, 8)

TRAINING = DemoWords(
    patterns=_lines(
        """
        {name} ordered {quantity} {item} for delivery to {city}.
        {name} from {city} ordered {quantity} {item}.
        {name} wants {quantity} {item} sent to {city}.
        {name} in {city} needs {quantity} {item}.
        {name} bought {quantity} {item} at our shop in {city}.
        {name} would like {quantity} {item}, shipped to {city}.
        {name} has asked us for {quantity} {item} in {city}.
        {name}, who lives in {city}, bought {quantity} {item}.
        {name} of {city} reserved {quantity} {item}.
        {name} paid for {quantity} {item} and had them sent to {city}.
        Please send {quantity} {item} to {name} in {city}.
        Please ship {quantity} {item} to {city} for {name}.
        Send {name} {quantity} {item}, the address is in {city}.
        Ship {quantity} {item} to {city}, the customer is {name}.
        Deliver {quantity} {item} to {name}, {city}.
        Pack {quantity} {item} for {name} and send them to {city}.
        We owe {name} in {city} {quantity} {item}.
        We sold {quantity} {item} to {name} from {city}.
        We shipped {quantity} {item} to {name} in {city} today.
        We got a call from {name} in {city} about {quantity} {item}.
        Our customer {name} asked for {quantity} {item} to be sent to {city}.
        Our shop in {city} sold {quantity} {item} to {name}.
        An order for {quantity} {item} came in from {name} in {city}.
        A parcel with {quantity} {item} left for {city}, addressed to {name}.
        {quantity} {item} should go to {name} in {city}.
        {quantity} {item} were ordered by {name} from {city}.
        {quantity} {item} are on their way to {city} for {name}.
        {quantity} {item}, please, for {name} in {city}.
        In {city}, {name} is waiting for {quantity} {item}.
        From {city}, {name} asked for {quantity} {item}.
        To {city}: {quantity} {item} for {name}.
        For {name} in {city}: {quantity} {item}.
        Order from {city}: {name} wants {quantity} {item}.
        Today {name} picked up {quantity} {item} in {city}.
        Yesterday {name} ordered {quantity} {item} to {city}.
        Hello, I am {name} from {city} and I need {quantity} {item}.
        Hi, this is {name}. Could you send {quantity} {item} to {city}?
        My name is {name}, I live in {city}, and I want to buy {quantity} {item}.
        Could {name} have {quantity} {item} delivered to {city}?
        It was {name} who ordered {quantity} {item} to {city}.
        """
    ),
    first_names=_words(
        "Amir Andrew Anita Audrey Brandon Christian Danielle David Donald Edward Elizabeth Emily Fatima Frank "
        "Henry Igor Jacob James Jane Joseph Lewis Louis Maria Mark Martin Mary Max Megan Michael Neil Olga Paul "
        "Penelope Peter Petra Phoebe Quentin Richard Robert Rosemary Sheila Simon Stella Theo Thomas Tom Valerie "
        "Vanessa Agatha Alexander Angus April Archie Bill Bob Chloe Chris Clark Dan Earl Ed Esme Fred George "
        "Grant Heidi Jean Josh Ken Leah Lee Lily Margot Marie Marisa Matt Maureen Nick Norma Paige Pat Phil Rob "
        "Rod Roman Ross Sam Scott Shane Stacy Stan Tim Will Elliot Ingrid Magnus Samuel Coreena Noris Herio Janel "
        "Floror Sanan Heron Julio Delina Norina Malor Carard Perita Leonita Darina Silic Salard Renas Salina "
        "Florio Romis Melina Gerio Floric Terita Berana Walana Malel Helian Melo Garana Serine Tamard Salus Teran "
        "Wilan Rosea Berard Toris Silana Berus Wilor Roson Silian Janeena Tamena Verine Noron Belina Torina Valas "
        "Salena Walio Valita Leonus Serus Leoner Julo Carus Florine Belon Teror Peris Marana Geror Malan Janis "
        "Renel Celel Deler Berio Delan Coro Marya Feris Julias Belias Rosie Darie Herette Geris Herena Valine "
        "Peric Perian Maline Caror Belus Ferine Valan Serina Malard Helie Wilie Berian Sanie Romard Sanana Toron "
        "Norard Beris Juline Terana Belian Sanio Torita Linan Gerard Salias Maris Malon Janor Janer Carel Gerus "
        "Helana Rosita Marus Walina Norita Calette Caline Marard Torias Linio Melias Terine Delis Rosette Careena "
        "Renita Ferina Delas Berias Roleena Tamie Valon Serio Romina Terian Terio Garie Linena Julon Sanon Delio "
        "Julis Belor Corena Malio Terina Siline Renette Renio Melian Seror Perana Terias Melor Salan Wilard Silan "
        "Rosina Janio Malias Helor Silina Floran Verard Romor Gerana Romias Delon Belo Valel Valic Delus Saline "
        "Berie Belic"
    ),
    last_names=_words(
        "Almeida Anderson Atkinson Brandt Carlson Collins Davis Delgado Farrell Fields Garrett Guzman Haas Hall "
        "Herrera Howell Jimenez Johnson Jones Leblanc Macdonald Maier Marino Mcdonald Newton Petrov Price Romero "
        "Salazar Smith Stone Valdez Walters Webster West Williams Young Archer Ashe Bird Byrd Decker Finley "
        "French Garland Grimes Hill House Hubbard Irwin Landry Lawson Leach Long Love Lowery May Moon Olson Orr "
        "Osborn Page Peck Pollard Rich Robbins Rose Rowe Short Silver Small Snow Strong Swanson Sweet Underwood "
        "Wall Wilder Wood Woodward Morales Osman Richter Tremblay Wilson Carstad Vermer Selmer Holero Bellberg "
        "Bellman Hamstein Parko Vanworth Armdon Winley Selton Solini Winini Burdez Ashini Janstrom Horstad "
        "Turstein Halton Colworth Harford Danmann Verstrom Holoso Solko Haroso Stanham Henini Armton Manwell "
        "Warone Armwell Chatwood Harworth Berwood Ferford Melwell Stanby Walham Colko Solaro Malham Valwell "
        "Selworth Boloff Halmann Ferrick Horberg Halford Ashden Berwell Danwick Armov Banberg Sanden Bellini "
        "Farwell Halworth Henmann Emer Marston Norwood Camton Norberg Beraro Pollin Ashson Palwell Norstrom "
        "Ashski Calnell Solwick Sanquist Carby Turlin Calnard Selgate Bellwood Calworth Linwell Selone Torridge "
        "Chatlin Selwood Bellko Verov Verham Moroso Camstein Stanvich Banero Bolski Ferquist Colero Solworth "
        "Rammer Hamstrom Polford Daner Corwick Armvich Malone Barnard Carden Janridge Goldon Melwood Broddon "
        "Wallin Henoso Caldez Sanlin Valstrom Henley Holstad Chatridge Solson Sanero Haller Corvich Broder Calmer "
        "Stanberg Ramnard Cararo Maldez Garberg Danwell Haldez Waloff Burrick Danberg Verrick Malwick Meler "
        "Calton Sanrick Parstein Berston Parov Chatnell Torley Horquist Holford Maloso Valby Ashrick Stanstein "
        "Colmann Paroso Landez Malman Vanwick Bolley Stanler Haroff Hamquist Verdon Hammann Parford Calgate "
        "Parham Vanone Corley Carley Walwood Carquist Stanmer Selston Corwood Vanquist Morstein Harwood Valer "
        "Banoff Turvich Walini Harwell Berley Rosler Armone Holquist Marski Danman Banstad Ferone Bolwell Daning "
        "Pararo Linley Valworth Selaro Armwick Harstein Manham Ashman Malnell Torquist Colvich Manridge Selwell "
        "Camvich Torwood Selrick Selstein Colone Melnell Polston Hamett Marby Calquist Ramquist Burby Malov "
        "Rosgate Parberg Faroff Valgate Torwick Winridge Valham Morby Henov Burham Armford Maloff Barstrom Boloso "
        "Banston Melworth Bolero Hamman Corrick Bolworth Chatquist Camwick Melero Garrick Ramdez Valrick Colov "
        "Sanman Bellson Polmann Solby Polworth Solman Danvich Polridge Ashgate Palero Stanoff Verwick Calero "
        "Vanrick Walmann Ramone Carworth Horvich"
    ),
    adjectives=_words(
        "blue green white yellow grey large square plastic paper heavy light hard cold thin thick bright plain "
        "dry rusty smooth iron tall deep printed woven knitted frozen fresh organic natural classic matte beige "
        "maroon brown purple orange tiny wide metal modern simple broken sharp empty basic complex dense digital "
        "elastic electric electronic firm glass grand greasy hidden magnetic mini open original plush pure rare "
        "safe secure slow smart solid solar tight traditional unique wet"
    ),
    nouns=_words(
        "tables pans pots boxes bags books drawers doors windows keys brushes shirts scarves umbrellas whistles "
        "flutes chargers adapters compasses buttons coasters ladles graters toasters blenders freezers rakes "
        "seeds gates staplers frames sofas backpacks torches sweaters sandals apples axles bagels beacons beans "
        "blocks blouses boards bonnets bookcases bookmarks bows bridles buckles burners canisters cans caps cases "
        "chains chips clamps clips coins combs computers controllers coolers couches covers daggers diapers "
        "earphones felts filters flags flowers footballs globes grills handbags hoods houses insulators kits "
        "labels leaves letters lights maps masks medallions melons mixers modems modules nets nuts papers pedals "
        "pegs phones photos pies poles projectors racks raincoats razors rubies servers sheets skirts spinners "
        "strings syringes tarps teapots timers tokens tools trees typewriters wings"
    ),
    cities=_words(
        "Paris London Turin Porto Accra Osaka Boston Algiers Beirut Darwin Genoa Harare Islamabad Jacksonville "
        "Lausanne Lincoln Monaco Newark Norwich Oxford Palermo Strasbourg Utrecht Washington Almaty Amman Angers "
        "Antalya Asheville Avignon Brno Campinas Chiba Curitiba Haifa Leon Lucerne Macau Maputo Modena Mosul "
        "Multan Padua Patras Penang Perm Rabat Reims Skopje Stavanger Stockton Surat Tripoli Trondheim Gothenburg "
        "Stuttgart Marseille Casablanca Busan Longburg Southhall Rowanton Coldland Walpool Fairville Upperworth "
        "Clearshire Whitestead Oldvale Springford Horndale Winterstad Greenholm Fairbrunn Barnness Lakeborough "
        "Clearminster Silverhill Springhurst Upperhurst Rockhall Wilport Highwick Lockwood Oldhall Southstead "
        "Faircliff Stanminster Applehaven Millwick Highmere Lockmere Northwick Ashover Westbrunn Saltshire "
        "Wilgrad Shellwood Fairwood Redside Summerburg Grandhurst Oldfell Springcliff Rockland Grandwood Rockbury "
        "Ashhaven Walvale Blackheim Stonegrad Oldworth Summerbrunn Saltover Grandmouth Eastwood Northby "
        "Summergate Grandbridge Shellport Silverland Whiteham Eastburg Summervale Marlland Summerhaven "
        "Highborough Lakeby Grandbrunn Walbrunn Winterby Newheim Highhill Ashwood Lakeburg Eastland Greenham "
        "Eastshire Maplegrad Winterfell Newstad Southfell Appledorf Wintervale Roseholm Oldmere Stanborough "
        "Weststead Winterdorf Coldheim Millbury Summerford Eastminster Barnbury Oldshire Weststad Northcliff "
        "Fairshire Coldthorpe Silverburg Coldport Edgebrunn Appleby Whiteford Reddale Saltgate Summerhill "
        "Highfell Coldford Fairthorpe Eastbury Saltdorf Oldwick Whiteworth Summershire Lakevale Ashby Castledale "
        "Fairfell Summergrad Rosebrunn Highshire Summermouth Springburg Redheim Grandpool Silverfell Whitehill "
        "Longstead Rockstead Rowanness Castlegate Blackhurst Coldhurst Lakehaven Northgrad Millhall Stoneville "
        "Southness Highham Rockfell Sandminster Newby Coldstad Saltstead Walhall Rowanshire Wilminster Wilside "
        "Upperfield Rowanside Sandham Shellville Rowanview Springholm Pinestead Walhurst Sandfell Whitebrunn "
        "Silverpool Stanstad Edgeworth Blackmouth Newbury Sandhill Northworth Edgeminster Castleton Southhaven "
        "Fairminster Redholm Barnfield Upperstad Millview Walminster Pineland Stancliff Wilford Shellmere "
        "Edgepool Highville Clearton Lockburg Blackbury Lakeville Eastford Winterholm Lakebridge Springgate "
        "Coldworth Rockness Whitethorpe Fairfield Mapleton Stanness Fairhurst Silverstad Stanbury Redton Sandview "
        "Highworth Greenover Lakewick Summerheim Southford Barnshire Lockland Sandworth Northdorf Ashcliff "
        "Redpool Queensthorpe Shellborough Lakeport Grandside Rowanbury Rockville Whiteholm Newhaven Barnford "
        "Southby Rosegrad Rockworth Springham Clearham Redmere Stonebridge Northfell Oldheim Eastport Westside "
        "Stoneby Roseview Clearford Stanhurst Applebridge Longville Upperpool Ashpool"
    ),
    quantities=tuple(n for n in range(2, 100) if n % 10 not in _HELD_OUT_LAST_DIGITS),
)

HELD_OUT = DemoWords(
    patterns=_lines(
        """
        {name} requested {quantity} {item} for {city}.
        {name} from {city} would like to buy {quantity} {item}.
        {name} is expecting {quantity} {item} in {city}.
        {name} called from {city} to order {quantity} {item}.
        Please deliver {quantity} {item} to {name} in {city}.
        Please get {quantity} {item} ready for {name} in {city}.
        We have to send {quantity} {item} to {city} for {name}.
        We received an order from {name} in {city} for {quantity} {item}.
        Our client {name} in {city} ordered {quantity} {item}.
        {quantity} {item} have to be shipped to {name} in {city}.
        {quantity} {item} were sold to {name} from {city}.
        In {city}, {name} bought {quantity} {item}.
        Hello, my name is {name}. I need {quantity} {item} in {city}.
        This morning {name} ordered {quantity} {item} to {city}.
        A box of {quantity} {item} goes to {name} in {city}.
        """
    ),
    first_names=_words(
        "Adam Alice Anna Arthur Carla Charles Daniel Jack John Jonas Luke Madeleine Matthew Maya Pauline Stephen "
        "Victor Virginia William Alex Ben Camille Carl Hope Jamie Jim Johan June Kim Ray Kenji Selma"
    ),
    last_names=_words(
        "Adams Ball Bell Christensen Cook Cross Daniels Donnelly Marsh Miller Moreno Park Ramirez Rossi Schultz "
        "Simmons Taylor Black Camp Church Day English Field King Lowe Penn Prince Summers Travis Jackson"
    ),
    adjectives=_words(
        "red round old new soft warm dark clean flat checkered rough oval quiet blank custom double icy upper"
    ),
    nouns=_words(
        "chairs belts violins binders brooches batons boats cards cartons chests easels inks lockets patches "
        "plants rails stones ties"
    ),
    cities=_words(
        "Rome Valencia Belgrade Chicago Cambridge Coventry Madison Assen Catania Galway Linz Malaga Medellin Metz "
        "Nicosia Samara Sendai Tampere Salzburg Graz Verona Antwerp Rotterdam Caracas"
    ),
    quantities=tuple(n for n in range(2, 100) if n % 10 in _HELD_OUT_LAST_DIGITS),
)
