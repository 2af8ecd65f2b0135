"""The words and sentence patterns of the demo task: one set to train on, another, sharing nothing with it, held out."""

from __future__ import annotations

from dataclasses import dataclass


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
    return tuple(word.replace("_", " ") for word in text.split())


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
        "Ada Adam Alice Amir Anna Anton Aria Arthur Bella Boris Carla Carlos Clara Daniel Diana Dora Edgar Elena Eli "
        "Emma Eric Eva Fatima Felix Fiona Frank Grace Greta Hana Hector Helen Hugo Ida Igor Irene Ivan Jack Jane Jonas "
        "Julia Karl Kate Laura Leo Lena Linus Lucy Marco Maria Martin Maya Mei Nadia Nina Noah Olga Oscar Paul "
        "Petra Quentin Rosa Rupert Sara Simon Stefan Tara Theo Tom Uma Vera Victor Walter Wanda Xenia Yara Yusuf "
        "Zara Zoe"
    ),
    last_names=_words(
        "Abbott Adler Ahmed Almeida Bauer Becker Bennett Berg Blake Brandt Carter Castro Chen Clark Cohen Costa "
        "Cruz Dalton Diaz Dubois Eriksen Evans Falk Fischer Foster Garcia Gupta Haas Hall Hansen Harris "
        "Hayes Ito Ivanov Jensen Johnson Jung Kaiser Kaya Keller Khan Kim Klein Kowalski Lang Larsen Lee Lopez Maier "
        "Marino Martinez Meyer Moore Murphy Nakamura Nguyen Novak Okafor Olsen Park Patel Perez Petrov Quinn Ramos "
        "Reyes Ricci Roberts Rossi Sato Schmidt Silva Singh Smith Sousa Stone Tanaka Taylor Turner Vargas Vogel Wagner "
        "Walker Weber Wong Wright Young Zimmer"
    ),
    adjectives=_words(
        "blue red green black white yellow grey golden small large round square wooden plastic paper old new cheap "
        "heavy light soft hard warm cold thin thick long short bright dark plain striped clean dry folding portable "
        "rusty shiny smooth spare"
    ),
    nouns=_words(
        "lamps chairs tables cups plates bowls spoons forks knives pans pots bottles boxes bags books pens pencils "
        "notebooks clocks mirrors pillows blankets towels curtains carpets shelves drawers doors windows keys locks "
        "hammers nails screws ropes ladders buckets brushes shirts jackets socks gloves hats scarves belts boots "
        "umbrellas candles vases baskets"
    ),
    cities=_words(
        "Oslo Paris London Berlin Madrid Rome Vienna Prague Dublin Athens Lisbon Warsaw Budapest Helsinki Stockholm "
        "Copenhagen Brussels Amsterdam Zurich Geneva Hamburg Munich Cologne Lyon Milan Naples Turin Porto Seville "
        "Valencia Krakow Sofia Bucharest Belgrade Zagreb Kyiv Moscow Istanbul Ankara Cairo Tunis Lagos Accra Nairobi "
        "Delhi Mumbai Chennai Dhaka Karachi Lahore Tehran Baghdad Bangkok Hanoi Manila Jakarta Singapore Seoul Tokyo "
        "Osaka Kyoto Beijing Shanghai Sydney Perth Auckland Toronto Montreal Ottawa Boston Chicago Denver Dallas "
        "Houston Seattle Portland Miami Atlanta Detroit Havana Lima Bogota Quito Santiago"
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
        "Agnes Albert Beatrice Bruno Cecilia Conrad Dennis Edith Elliot Esther George Gloria Harold Ingrid "
        "Isaac Jasmine Joel Katarina Kenji Lydia Magnus Miriam Nathan Olivia Patrick Priya Ralph Rebecca Samuel Selma "
        "Tobias Ursula Vincent Wendy"
    ),
    last_names=_words(
        "Andersen Barnes Bianchi Campbell Chavez Douglas Edwards Fernandez Fontaine Griffin Hoffmann Hughes Jackson "
        "Kapoor Kruger Lambert Lindgren Mancini Mitchell Morales Nielsen Osman Phillips Richter Sanders Schneider "
        "Suzuki Thompson Tremblay Watanabe Werner Wilson Yamada Ziegler"
    ),
    adjectives=_words(
        "brown purple orange silver tiny huge narrow wide metal leather cotton modern simple sturdy quiet fancy broken "
        "sharp curved empty"
    ),
    nouns=_words(
        "desks sofas benches stools glasses mugs trays jars kettles backpacks suitcases envelopes magazines posters "
        "rulers erasers tents torches saws drills wires pipes tiles bricks coats sweaters sandals wallets"
    ),
    cities=_words(
        "Bergen Malmo Gothenburg Tallinn Riga Vilnius Leipzig Stuttgart Bremen Salzburg Graz Basel Florence Bologna "
        "Verona Bilbao Granada Bordeaux Marseille Nantes Antwerp Rotterdam Glasgow Liverpool Bristol Cardiff Belfast "
        "Casablanca Dakar Kampala Pune Jaipur Kathmandu Busan Taipei Brisbane Melbourne Vancouver Calgary Phoenix "
        "Nashville Caracas"
    ),
    quantities=tuple(n for n in range(2, 100) if n % 10 in _HELD_OUT_LAST_DIGITS),
)
