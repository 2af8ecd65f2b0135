"""The words and sentence patterns of the demo task: one set to train on, another, sharing nothing with it, held out.

The lists to train on are long, and half of their names and places are built from halves of names, so that hardly any
comes twice: a model that meets the same eighty cities over and over learns their spelling instead of learning to copy,
and then misspells other cities.
"""

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


def _with_built(known: str, starts: str, ends: str) -> tuple[str, ...]:
    """The known names, and about as many that are built from halves, spread evenly over all that can be built."""
    names = known.split()
    built = [start + end for start in starts.split() for end in ends.split()]
    step = len(built) / len(names)
    return tuple(dict.fromkeys((*names, *(built[int(i * step)] for i in range(len(names))))))


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
    first_names=_with_built(
        "Ada Adam Adrian Alan Alice Amanda Amir Amy Andrea Andrew Angela Anita Anna Anthony Anton Aria Arthur "
        "Ashley Audrey Barbara Basil Bella Benjamin Bernard Beth Betty Bianca Boris Brandon Brian Bridget Caleb "
        "Carla Carlos Carmen Caroline Catherine Charles Charlotte Christian Christina Christopher Claire Clara "
        "Claudia Colin Craig Crystal Cynthia Cyril Daniel Danielle Darius David Deborah Derek Diana Dominic "
        "Donald Dora Doris Dorothy Dylan Edgar Edmund Eduardo Edward Eleanor Elena Eli Elizabeth Ellen Emily Emma "
        "Eric Ernest Ethan Eugene Eva Evelyn Fatima Felix Fiona Frances Francis Frank Frederick Gabriel Gavin "
        "Geoffrey Gerald Gilbert Gordon Grace Graham Greta Gregory Hana Hannah Harriet Harvey Hector Heather "
        "Helen Henry Herbert Howard Hugo Ian Ida Igor Irene Isabel Ivan Jack Jacob James Jane Janet Jasper "
        "Jeffrey Jennifer Jeremy Jessica Joan John Jonas Jonathan Joseph Joshua Joyce Judith Julia Julian Karen "
        "Karl Kate Keith Kenneth Kevin Kimberly Larry Laura Lauren Lawrence Leo Leonard Leslie Lena Lewis Linda "
        "Linus Lisa Louis Louise Lucas Lucy Luke Madeleine Marco Margaret Maria Marian Mark Marshall Martha "
        "Martin Mary Matthew Maurice Max Maya Megan Mei Melissa Michael Michelle Monica Morgan Nadia Nancy "
        "Natalie Neil Nicholas Nicole Nina Noah Nora Norman Olga Oliver Oscar Pamela Patricia Paul Pauline Pedro "
        "Penelope Peter Petra Philip Phoebe Quentin Rachel Raymond Richard Robert Roger Ronald Rosa Rosemary Roy "
        "Rupert Russell Ruth Sally Sandra Sara Sebastian Sharon Sheila Simon Sofia Spencer Stanley Stefan Stella "
        "Stephanie Stephen Steven Stuart Susan Sylvia Tara Teresa Theo Theodore Thomas Timothy Todd Tom Tracy Uma "
        "Valerie Vanessa Vera Veronica Victor Victoria Viola Virginia Walter Wanda Warren Wayne Wesley William "
        "Xenia Yara Yvonne Zachary Zara Zoe",
        "Ad Al Am An Ar Bel Ber Bri Cal Car Cel Cor Dal Dar Del Dor El Em Er Fer Flor Gar Ger Gil Hel Her Il Jan "
        "Jor Jul Kar Kel Lan Lar Leon Lin Lor Mal Mar Mel Mir Nad Nel Nor Ol Or Per Ral Ren Rol Rom Ros Sal San "
        "Ser Sil Tal Tam Ter Tor Val Ver Vin Wal Wil Yol Zel",
        "a an ana ard as ea eena el ena er ette ian ias ic ie ina ine io is ita o on or us ya",
    ),
    last_names=_with_built(
        "Abbott Adams Adler Ahmed Alexander Allen Almeida Anderson Armstrong Arnold Atkinson Austin Bailey Baker "
        "Baldwin Ball Banks Barker Barrett Bates Bauer Beck Becker Bell Bennett Benson Berg Bishop Blair Blake "
        "Bowman Boyd Bradley Brandt Brennan Brewer Brooks Bryant Buchanan Burgess Burke Burns Burton Butler "
        "Caldwell Cameron Carlson Carpenter Carroll Carter Castro Chambers Chandler Chapman Chen Christensen "
        "Clark Clarke Cohen Coleman Collins Cook Cooper Costa Cox Crawford Cross Cruz Cunningham Curtis Dalton "
        "Daniels Davidson Davies Davis Dawson Delgado Diaz Dixon Donnelly Doyle Drake Dubois Duncan Dunn Elliott "
        "Ellis Eriksen Evans Falk Farrell Ferguson Fields Fischer Fisher Fitzgerald Fletcher Flynn Foster Fowler "
        "Fox Franklin Fraser Freeman Fuller Garcia Gardner Garrett Gibson Goldberg Gomez Gonzalez Goodman Graves "
        "Greene Gregory Gupta Guzman Haas Hall Hamilton Hammond Hansen Hardy Harper Harris Harrison Hawkins Hayes "
        "Henderson Hernandez Herrera Hicks Higgins Hoffman Holland Holmes Hopkins Howell Hudson Hunter Ito Ivanov "
        "Jefferson Jenkins Jensen Jimenez Johnson Jones Jordan Kaiser Kaya Keller Kelly Kennedy Khan Kim Klein "
        "Knight Kowalski Lang Larsen Larson Leblanc Lee Leonard Lindsay Logan Lopez Lucas Lynch Macdonald Maier "
        "Marino Marsh Martinez Mason Maxwell Mcdonald Mendoza Meyer Miller Mills Montgomery Moore Moreno Morgan "
        "Morris Morrison Murphy Murray Myers Nakamura Nelson Newman Newton Nguyen Norris Norton Novak Okafor "
        "Oliver Olsen Owens Palmer Park Parker Parsons Patel Patterson Payne Pearson Perez Perkins Peters "
        "Peterson Petrov Pierce Porter Powell Price Quinn Ramirez Ramos Reed Reyes Reynolds Ricci Richardson "
        "Rivera Roberts Robertson Robinson Rodriguez Rogers Romero Ross Rossi Russell Ryan Salazar Sato Saunders "
        "Schmidt Schultz Scott Sharma Shaw Shepherd Silva Simmons Simpson Sinclair Singh Smith Snyder Sousa "
        "Spencer Stanley Stevens Stewart Stone Sullivan Sutton Tanaka Taylor Todd Torres Townsend Tucker Turner "
        "Valdez Vargas Vasquez Vaughn Vogel Wagner Walker Wallace Walsh Walters Ward Warner Watkins Watson Weaver "
        "Webb Weber Webster Weiss Wells West Wheeler Wilkinson Williams Williamson Willis Wolf Wong Woods Wright "
        "Young Zimmer",
        "Ab Ack Al Arm Ash Ban Bar Beck Bell Ber Bol Bran Brod Bur Cal Cam Car Chat Col Cor Cran Dal Dan Dor Dun "
        "El Em Far Fen Fer Gar Gol Gran Hal Ham Har Hen Hol Hor Jan Kar Kel Kol Kor Lam Lan Lin Lor Mal Man Mar "
        "Mel Mor Nor Or Pal Par Pel Pol Ram Ras Ros San Sel Sol Stan Tal Tor Tur Val Van Ver Wal War Wen Win Zel",
        "aro berg by den dez don er ero es ett ford gate gren ham ing ini ko ler ley lin man mann mer nard nell "
        "off one oso ov quist ridge rick sen ski son stad stein ston strom ton vich well wick wood worth",
    ),
    adjectives=_words(
        "blue red green black white yellow grey golden small large round square wooden plastic paper old new cheap "
        "heavy light soft hard warm cold thin thick long short bright dark plain striped clean dry folding portable "
        "rusty shiny smooth spare woolen copper iron steel silk linen rubber ceramic crystal velvet marble bamboo "
        "antique rustic elegant delicate fragile durable flexible compact slim tall deep shallow flat hollow polished "
        "painted printed woven knitted carved frozen fresh organic natural vintage classic scented waterproof "
        "reusable padded quilted checkered spotted glossy matte transparent colourful pink turquoise crimson beige "
        "ivory scarlet violet maroon cheerful funny strange gentle rough crooked oval triangular miniature giant"
    ),
    nouns=_words(
        "lamps chairs tables cups plates bowls spoons forks knives pans pots bottles boxes bags books pens pencils "
        "notebooks clocks mirrors pillows blankets towels curtains carpets shelves drawers doors windows keys locks "
        "hammers nails screws ropes ladders buckets brushes shirts jackets socks gloves hats scarves belts boots "
        "umbrellas candles vases baskets marbles puzzles balloons kites whistles flutes drums violins guitars "
        "trumpets cameras printers keyboards monitors speakers batteries cables chargers adapters routers tablets "
        "telescopes compasses lanterns hooks hinges handles buttons zippers ribbons needles scissors aprons napkins "
        "coasters platters ladles whisks graters peelers toasters blenders freezers heaters radiators faucets sinks "
        "bathtubs sponges mops brooms shovels rakes seeds bulbs shrubs fences gates benchtops cushions mattresses "
        "hammocks cradles strollers scooters bicycles helmets skates paddles anchors sails rafts trophies medals "
        "badges stamps calendars folders binders staplers markers crayons canvases frames statues figurines "
        "bracelets earrings necklaces brooches"
    ),
    cities=_with_built(
        "Oslo Paris London Berlin Madrid Rome Vienna Prague Dublin Athens Lisbon Warsaw Budapest Helsinki "
        "Stockholm Copenhagen Brussels Amsterdam Zurich Geneva Hamburg Munich Cologne Lyon Naples Turin Porto "
        "Seville Valencia Krakow Bucharest Belgrade Zagreb Kyiv Istanbul Ankara Cairo Tunis Lagos Accra Nairobi "
        "Delhi Mumbai Chennai Dhaka Lahore Baghdad Bangkok Hanoi Manila Jakarta Singapore Seoul Tokyo Osaka Kyoto "
        "Beijing Shanghai Sydney Perth Auckland Toronto Montreal Ottawa Boston Chicago Denver Dallas Houston "
        "Seattle Portland Miami Atlanta Detroit Havana Lima Bogota Quito Santiago Adelaide Albany Alexandria "
        "Algiers Anchorage Austin Baltimore Bangalore Barcelona Beirut Birmingham Boulder Bradford Brighton "
        "Brooklyn Buffalo Calcutta Cambridge Canberra Canterbury Charleston Charlotte Cincinnati Cleveland "
        "Columbia Columbus Coventry Damascus Darwin Derby Dresden Dubai Durban Durham Edinburgh Edmonton Essex "
        "Exeter Frankfurt Genoa Guangzhou Halifax Hampton Hannover Harare Hartford Heidelberg Honolulu Hyderabad "
        "Indianapolis Islamabad Jacksonville Jerusalem Johannesburg Kabul Kansas Karachi Kingston Kiev Kolkata "
        "Kuwait Lancaster Lausanne Leeds Leicester Lexington Lincoln Louisville Luxembourg Madison Malta "
        "Manchester Medina Memphis Mexico Milan Milwaukee Minneapolis Monaco Monterey Moscow Newark Newcastle "
        "Newport Norfolk Norwich Nottingham Oakland Oklahoma Omaha Orlando Oxford Palermo Panama Philadelphia "
        "Pittsburgh Plymouth Portsmouth Preston Princeton Quebec Raleigh Reading Richmond Rochester Sacramento "
        "Salem Savannah Sheffield Southampton Springfield Stanford Strasbourg Sunderland Syracuse Taiwan Tampa "
        "Tehran Tucson Tulsa Utrecht Venice Virginia Washington Wellington Wichita Wimbledon Winchester Windsor "
        "Winnipeg Worcester Yale York",
        "Alder Amber Apple Ash Barn Birch Black Bram Bright Brook Castle Chester Clear Cold Crow Dal Deer East "
        "Edge Elm Fair Falken Fox Glen Grand Green Grim Hart Hazel Heather High Horn Kings Lang Lake Linden Lock "
        "Long Maple Marl Mill Moss Nether New North Oak Old Otter Pine Queens Raven Red Rock Rose Rowan Salt Sand "
        "Shell Silver South Spring Stan Stone Summer Swan Thorn Upper Wal West White Wil Winter Wolf",
        "borough bridge brunn burg bury by cliff dale dorf fell field ford gate grad hall ham haven heim hill "
        "holm hurst land mere minster mouth ness over pool port shire side stad stead thorpe ton vale view ville "
        "wick wood worth",
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
