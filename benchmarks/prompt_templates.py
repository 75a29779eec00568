"""Instructions, topic lists and sentence frames from which `wide_prompts.py` builds prompts; all written for it."""

import random

TRANSLATE = [
    "Translate {source} to {target}: {text}",
    "Translate {source} to {target}: {text}",
    "Translate from {source} to {target}: {text}",
    "Translate the following {source} sentence into {target}: {text}",
    "Translate this {source} text into {target}:\n\n{text}",
    "{source}: {text}\n{target}:",
    "What does this {source} sentence mean in {target}?\n{text}",
    'How would you say this in {target}? "{text}"',
    "{text}\n\nTranslate the sentence above into {target}.",
    "Please translate into {target}: {text}",
]
SUMMARIZE = [
    "Summarize: {text}",
    "Summarize: {text}",
    "Summarize: {text}",
    "Summarize the following text: {text}",
    "Summarize the following article in three sentences:\n\n{text}",
    "Summarize this passage in one sentence.\n\n{text}",
    "{text}\n\nTL;DR:",
    "{text}\n\nSummarize the text above in two or three sentences.",
    "Give a short summary of this text:\n{text}",
    "What are the main points of the following passage?\n\n{text}",
    "Write a brief summary of the article below.\n\n{text}",
    "Summarise in simple words what this text says.\n\n{text}",
    "Shorten this text to its key message: {text}",
]
ASK_TITLE = [
    "what is {x}?", "what is {x} about?", "what does the text say about {x}?", "how is {x} described?", "explain {x}",
    "why is {x} important?", "what are the main facts about {x}?", "what is {x} known for?",
]  # fmt: skip
ASK_NAME = [
    "what does the text say about {x}?", "who or what is {x}?", "what is the role of {x}?", "how is {x} mentioned?",
    "what is said about {x} here?", "why is {x} mentioned?", "what happened with {x}?", "what is the connection to {x}?",
]  # fmt: skip
ASK_YEAR = [
    "what happened in {x}?",
    "why is {x} mentioned?",
    "what took place in {x}?",
    "what is the significance of the year {x}?",
]
ASK_TERM = [
    'what is meant by "{x}" here?', 'what does the passage say with the word "{x}"?', "what role does {x} play in the text?",
    'in what context does the word "{x}" appear?', 'which sentence mentions "{x}", and what does it say?',
]  # fmt: skip
ASK_STATEMENT = [
    "{v} {s} {r}?",
    "why {v} {s} {r}?",
    "what {v} {s}?",
    "how {v} {s} {r}?",
    "is it true that {s} {v} {r}?",
    "when {v} {s} {r}?",
]
PASSAGE_STYLES = [
    "{text}",
    "{text}",
    "[{i}] {text}",
    "Passage {i}: {text}",
    "Document {i} (Title: {title}) {text}",
    "{title}\n{text}",
]
RETRIEVE = [
    "Answer the question using the passages below.\n\n{passages}\n\nQuestion: {question}\nAnswer:",
    "Use the following context to answer the question.\n\nContext:\n{passages}\n\nQuestion: {question}",
    "{passages}\n\nBased on the text above, answer the question: {question}",
    "{passages}\n\n{question}",
    "Question: {question}\n\nRead these passages and answer in one or two sentences.\n\n{passages}",
    "I found these texts:\n\n{passages}\n\nPlease answer from them only: {question}",
    "{passages}\n\nGiven the information above, please answer: {question}",
]


# Short factual questions ------------------------------------------------------------------------------------------------

COUNTRIES = """Argentina, Australia, Austria, Bangladesh, Belgium, Bolivia, Brazil, Bulgaria, Cambodia, Cameroon, Canada, Chile, China,
Colombia, Costa Rica, Croatia, Cuba, Denmark, Ecuador, Egypt, Estonia, Ethiopia, Finland, France, Georgia, Germany, Ghana, Greece,
Guatemala, Haiti, Hungary, Iceland, India, Indonesia, Iran, Iraq, Ireland, Israel, Italy, Jamaica, Japan, Jordan, Kazakhstan, Kenya,
Laos, Latvia, Lebanon, Lithuania, Madagascar, Malaysia, Mali, Malta, Mexico, Mongolia, Morocco, Mozambique, Nepal, New Zealand, Nigeria,
Norway, Pakistan, Panama, Paraguay, Peru, Poland, Portugal, Romania, Rwanda, Saudi Arabia, Scotland, Senegal, Serbia, Singapore,
Slovakia, Slovenia, South Africa, South Korea, Spain, Sri Lanka, Sweden, Switzerland, Tanzania, Thailand, Tunisia, Turkey, Uganda,
Ukraine, Uruguay, Venezuela, Vietnam, Wales, Zambia, Zimbabwe"""
CITIES = """Amsterdam, Athens, Baghdad, Bangkok, Barcelona, Beijing, Berlin, Boston, Brussels, Budapest, Buenos Aires, Cairo, Cape Town,
Chicago, Copenhagen, Dallas, Delhi, Denver, Dublin, Edinburgh, Florence, Geneva, Hamburg, Helsinki, Hong Kong, Houston, Istanbul,
Jerusalem, Kyoto, Lagos, Lisbon, London, Los Angeles, Madrid, Manila, Melbourne, Miami, Montreal, Moscow, Mumbai, Munich, Nairobi,
New Orleans, New York, Oslo, Paris, Philadelphia, Prague, Rome, San Francisco, Seattle, Seoul, Shanghai, Stockholm, Sydney, Tokyo,
Toronto, Venice, Vienna, Warsaw, Zurich"""
FILMS = """Titanic, Avatar, Jaws, Casablanca, Gladiator, Inception, Frozen, Psycho, Rocky, Grease, Alien, The Matrix, Forrest Gump,
The Godfather, Toy Story, Back to the Future, Jurassic Park, Star Wars, Finding Nemo, Shrek, Home Alone, Top Gun, Dirty Dancing, Ghost,
Pretty Woman, Braveheart, Apollo 13, The Sixth Sense, The Truman Show, Mary Poppins, The Wizard of Oz, The Sound of Music, Mean Girls,
Legally Blonde, Men in Black, Independence Day, The Terminator, Die Hard, Ghostbusters, Pulp Fiction, The Shining, Black Panther,
Iron Man, Interstellar, Coco, Moana, Ratatouille, Up, Cars, Aladdin, Mulan, Bambi, Dumbo, Cinderella, The Jungle Book, Breaking Bad,
Friends, The Office, Stranger Things, The Simpsons, Game of Thrones, The Walking Dead, Grey's Anatomy, The Crown, Lost, Seinfeld"""
BOOKS = """Pride and Prejudice, Moby Dick, Dracula, Frankenstein, The Great Gatsby, 1984, Animal Farm, Brave New World, Hamlet, Macbeth,
Romeo and Juliet, Don Quixote, War and Peace, Crime and Punishment, Jane Eyre, Wuthering Heights, Great Expectations, Oliver Twist,
A Christmas Carol, Treasure Island, The Odyssey, The Iliad, The Divine Comedy, Faust, The Hobbit, The Lord of the Rings, Dune,
The Catcher in the Rye, To Kill a Mockingbird, Lord of the Flies, Of Mice and Men, The Grapes of Wrath, Charlotte's Web, Matilda,
Alice in Wonderland, Peter Pan, The Secret Garden, Little Women, The Call of the Wild, Heidi, Pinocchio, Les Miserables, The Stranger,
The Little Prince, The Alchemist, Things Fall Apart, Beloved, The Color Purple, The Handmaid's Tale, The Hunger Games, Twilight"""
PEOPLE = """Albert Einstein, Isaac Newton, Marie Curie, Charles Darwin, Galileo Galilei, Nikola Tesla, Thomas Edison, Ada Lovelace, Alan Turing,
Louis Pasteur, Gregor Mendel, Johannes Kepler, Leonardo da Vinci, Michelangelo, Vincent van Gogh, Pablo Picasso, Claude Monet, Rembrandt,
Frida Kahlo, Mozart, Beethoven, Johann Sebastian Bach, Chopin, Elvis Presley, Michael Jackson, Bob Marley, Freddie Mercury, Madonna,
Julius Caesar, Cleopatra, Alexander the Great, Genghis Khan, Napoleon, Queen Victoria, Henry VIII, Joan of Arc, Marco Polo,
Christopher Columbus, Ferdinand Magellan, Captain Cook, George Washington, Abraham Lincoln, Benjamin Franklin, Theodore Roosevelt,
John F. Kennedy, Martin Luther King, Rosa Parks, Nelson Mandela, Mahatma Gandhi, Mother Teresa, Winston Churchill, Florence Nightingale,
Amelia Earhart, Neil Armstrong, Yuri Gagarin, Muhammad Ali, Pele, Diego Maradona, Michael Jordan, Serena Williams, Usain Bolt,
William Shakespeare, Jane Austen, Mark Twain, Ernest Hemingway, Agatha Christie, Oscar Wilde, Homer, Dante, Goethe, Leo Tolstoy, Plato,
Aristotle, Socrates, Confucius, Karl Marx, Sigmund Freud, Immanuel Kant, Adam Smith, Walt Disney, Charlie Chaplin, Alfred Hitchcock"""
INVENTIONS = """telephone, light bulb, printing press, steam engine, bicycle, airplane, radio, television, camera, telescope, microscope, compass,
thermometer, barometer, typewriter, sewing machine, refrigerator, microwave oven, dishwasher, vacuum cleaner, washing machine, zipper,
safety pin, ballpoint pen, pencil, umbrella, elevator, escalator, traffic light, helicopter, submarine, parachute, dynamite, vaccine,
penicillin, x-ray machine, battery, transistor, laser, computer mouse, world wide web, email, mobile phone, credit card, barcode,
paper, gunpowder, wheelbarrow, mechanical clock, contact lens, toothbrush, chewing gum, potato chip, jigsaw puzzle, piano, saxophone"""
EVENTS = """the french revolution, the american civil war, world war i, world war ii, the vietnam war, the korean war, the cold war,
the boston tea party, the moon landing, the battle of waterloo, the battle of hastings, the black death, the great fire of london,
the russian revolution, the fall of the berlin wall, the sinking of the lusitania, the gold rush, the industrial revolution,
the signing of the magna carta, the first olympic games, the first world cup, the wall street crash, the great depression,
the chernobyl disaster, the san francisco earthquake, the eruption of vesuvius, the fall of constantinople, the spanish armada,
the crusades, the reformation, the salem witch trials, the louisiana purchase, the emancipation proclamation, the suez crisis,
the cuban missile crisis, the partition of india, the end of apartheid, the treaty of versailles, the renaissance, woodstock"""
SPORTS = """football, basketball, baseball, tennis, cricket, rugby, golf, ice hockey, volleyball, handball, badminton, table tennis, boxing,
judo, karate, fencing, archery, swimming, water polo, rowing, sailing, surfing, skiing, snowboarding, figure skating, curling, cycling,
gymnastics, softball, lacrosse, squash, darts, snooker, bowling, polo, triathlon, marathon running, wrestling, chess, formula one"""
BODY = """heart, liver, kidney, brain, lung, stomach, spleen, pancreas, skin, thyroid gland, pituitary gland, small intestine, large intestine,
gallbladder, bladder, diaphragm, retina, cornea, cochlea, eardrum, femur, tibia, collarbone, spinal cord, aorta, red blood cell,
white blood cell, bone marrow, lymph node, appendix, cerebellum, hippocampus, achilles tendon, rib cage, jaw, kneecap, tongue, thymus"""
FOODS = """pizza, sushi, croissant, hummus, falafel, paella, risotto, lasagna, pretzel, sauerkraut, goulash, kimchi, curry, taco, burrito, guacamole,
chocolate, coffee, tea, cheese, yogurt, tofu, soy sauce, mustard, ketchup, mayonnaise, vinegar, olive oil, honey, maple syrup, vanilla,
cinnamon, black pepper, saffron, ginger, garlic, potato, tomato, avocado, banana, pineapple, mango, rice, quinoa, oats, bread, pasta,
ice cream, cheesecake, apple pie, tiramisu, baklava, marshmallow, popcorn, peanut butter, champagne, beer, whiskey, tequila, lemonade"""
ANIMALS = """blue whale, elephant, giraffe, lion, tiger, cheetah, polar bear, panda, koala, kangaroo, platypus, penguin, ostrich, eagle, owl, parrot,
hummingbird, flamingo, peacock, shark, dolphin, octopus, jellyfish, seahorse, salmon, eel, crocodile, turtle, chameleon, cobra, frog,
salamander, honey bee, ant, butterfly, spider, scorpion, snail, earthworm, bat, hedgehog, squirrel, beaver, wolf, fox, camel, llama,
horse, cow, goat, sheep, pig, chicken, rabbit, cat, dog, gorilla, chimpanzee, sloth, armadillo"""
PLACES = """mount everest, the eiffel tower, the great wall, the taj mahal, the colosseum, stonehenge, machu picchu, the grand canyon, niagara falls,
the dead sea, the sahara desert, the amazon river, the nile, the danube, the mississippi river, lake victoria, lake baikal, mount fuji,
mount kilimanjaro, the matterhorn, the great barrier reef, the panama canal, the suez canal, the golden gate bridge, big ben,
the statue of liberty, the white house, the louvre, the vatican, easter island, the galapagos islands, yellowstone national park,
ayers rock, the bermuda triangle, the black forest, the alps, the himalayas, the andes, the gobi desert, the strait of gibraltar,
the english channel, the great pyramid, petra, angkor wat, the acropolis, the kremlin, the brandenburg gate, loch ness, mount vesuvius"""
SONGS = """imagine, yesterday, bohemian rhapsody, thriller, billie jean, hotel california, stairway to heaven, hey jude, let it be, dancing queen,
waterloo, like a virgin, purple rain, smells like teen spirit, wonderwall, every breath you take, sweet caroline, piano man, jolene,
ring of fire, blue suede shoes, hound dog, johnny b. goode, respect, i will always love you, my heart will go on, rolling in the deep,
shape of you, white christmas, silent night, jingle bells, amazing grace, happy birthday to you, over the rainbow, what a wonderful world,
stand by me, lean on me, no woman no cry, born in the usa, sweet home alabama, take on me, the final countdown, eye of the tiger"""
TERMS = """photosynthesis, osmosis, inflation, democracy, gravity, gross domestic product, a mortgage, a black hole, an eclipse, a vitamin, an enzyme,
a metaphor, a haiku, a sonnet, an algorithm, a virus, a tsunami, a monsoon, a glacier, a fossil, a supernova, a comet, a leap year,
the equator, the food chain, the water cycle, the rock cycle, the ozone layer, the greenhouse effect, the periodic table, a prime number,
a noun, an adverb, jazz, baroque music, an opera, impressionism, feudalism, capitalism, communism, the stock market, a bond,
an interest rate, insulin, cholesterol, a calorie, dna, a chromosome, mitosis, a neutron, an isotope, ph, static electricity, sonar, radar,
a constitution, a veto, the electoral college, the supreme court, the european union, the united nations, nato, a search engine"""

FACTS = [
    (COUNTRIES, ["what is the capital of {x}", "what language do they speak in {x}", "what is the currency of {x}", "where is {x} located on the map",
                 "what is the population of {x}", "what is the largest city in {x}", "who is the head of state of {x}", "when did {x} become independent",
                 "what countries share a border with {x}", "what is the national animal of {x}", "what is the highest mountain in {x}",
                 "what are the colors of the flag of {x}", "what is the longest river in {x}", "what is {x} famous for", "what is the main religion in {x}",
                 "what is the national dish of {x}"]),
    (CITIES, ["what country is {x} in", "what river runs through {x}", "what is the oldest building in {x}", "how many people live in {x}",
              "when was {x} founded", "what is the name of the airport in {x}", "what is there to see in {x}", "how did {x} get its name"]),
    (FILMS, ["who plays the lead in {x}", "when did {x} come out", "who directed {x}", "where was {x} filmed", "who wrote the music for {x}",
             "what is the name of the main character in {x}", "how does {x} end", "how long is {x}", "who produced {x}"]),
    (BOOKS, ["who wrote {x}", "when was {x} first published", "what is the main theme of {x}", "who is the narrator of {x}", "where does {x} take place",
             "who is the main character of {x}", "how many chapters are in {x}", "what happens at the end of {x}"]),
    (PEOPLE, ["when was {x} born", "where was {x} born", "what is {x} famous for", "how did {x} die", "where is {x} buried", "who was {x} married to",
              "at what age did {x} die", "where did {x} grow up"]),
    (INVENTIONS, ["who invented the {x}", "when was the {x} invented", "how does the {x} work", "what was used before the {x}", "where was the first {x} made"]),
    (EVENTS, ["when did {x} take place", "who was involved in {x}", "what caused {x}", "where did {x} happen", "how did {x} end", "why was {x} important"]),
    (SPORTS, ["how many players are on a team in {x}", "who invented {x}", "how long does a match last in {x}", "what are the basic rules of {x}",
              "what equipment do you need for {x}", "when did {x} become an olympic sport", "who is the best player in the history of {x}"]),
    (BODY, ["what is the function of the {x}", "where is the {x} located in the human body", "what happens when the {x} is damaged", "what is the {x} made of",
            "what is the {x} connected to", "how big is the {x}"]),
    (FOODS, ["where does {x} come from", "what is {x} made of", "how is {x} made", "who invented {x}", "how many calories are in {x}", "how long does {x} keep"]),
    (ANIMALS, ["how long does a {x} live", "what does a {x} eat", "where does the {x} live in the wild", "how fast can a {x} go", "how much does a {x} weigh",
               "what is a baby {x} called", "is the {x} an endangered species", "how does a {x} sleep"]),
    (PLACES, ["where is {x}", "who discovered or built {x}", "how big is {x}", "how old is {x}", "why is {x} famous", "what is the history of {x}", "when is the best time to visit {x}"]),
    (SONGS, ["who sings {x}", "who wrote the song {x}", "when was the song {x} released", "what is the song {x} about", "what album is the song {x} on"]),
    (TERMS, ["what is {x}", "who discovered or first described {x}", "what is the meaning of {x}", "why is {x} important", "what is an example of {x}", "how does {x} work", "where does the word for {x} come from"]),
]  # fmt: skip


def words_of(text: str) -> list[str]:
    """The items of a list written with commas."""
    return [" ".join(item.split()) for item in text.split(",")]


def facts(rng: random.Random) -> list[str]:
    """Every question with every subject of its list; most in lower case, with or without a question mark."""
    questions = [
        frame.format(x=subject) for subjects, frames in FACTS for subject in words_of(subjects) for frame in frames
    ]
    return [
        rng.choice(
            [question.lower(), question.lower(), question.lower() + "?", question[0].upper() + question[1:] + "?"]
        )
        for question in questions
    ]


# Everyday chat and its kinds --------------------------------------------------------------------------------------------

TOPICS = """learning to cook, planning a garden, moving to a new city, a first job, saving money, running a marathon, keeping a diary, adopting a dog,
working from home, a long train journey, climate change, social media, public libraries, electric cars, city bicycles, school uniforms,
video games, sleep, healthy breakfasts, learning a language, playing the guitar, photography, camping, chess, knitting, birdwatching,
baking bread, coffee, growing old, friendship, honesty, patience, failure, curiosity, a rainy day, the sea, mountains, autumn, snow,
a lost key, an old house, a lighthouse, a robot, a time machine, a secret map, a talking cat, a dragon, a small village, space travel,
artificial intelligence, remote learning, museums, recycling, plastic waste, vegetarian food, meditation, yoga, jogging, stress at work,
job interviews, public speaking, small talk, a class reunion, a wedding, a birthday party, a neighbour's noise, renting a flat"""
ROLES = """pirate, detective, medieval knight, doctor, travel guide, chef, history teacher, fitness coach, librarian, astronaut, grumpy old wizard,
football commentator, fashion designer, career adviser, news reader, gardener, lawyer, judge, poet, salesman, museum guide, robot butler,
kindergarten teacher, philosopher, car mechanic, farmer, sea captain, ghost, alien visitor, stand-up comedian, film critic, bank clerk,
hotel receptionist, private tutor, nutritionist, psychologist, blacksmith, queen of a small kingdom, time traveller, firefighter"""
SCIENCE = """how vaccines work, how rainbows form, why the sky is blue, plate tectonics, the structure of an atom, chemical bonds, acids and bases,
Newton's laws of motion, conservation of energy, electric circuits, magnetism, the speed of light, special relativity, quantum entanglement,
semiconductors, how batteries store energy, nuclear fusion, radioactive decay, natural selection, genetic inheritance, cell division,
the immune system, photosynthesis, the carbon cycle, ocean currents, how earthquakes are measured, volcanoes, black holes,
the life cycle of a star, the phases of the moon, tides, how airplanes fly, how engines work, bridges and load, concrete, steel, polymers,
antibiotics and resistance, enzymes, neurons, machine learning, neural networks, cryptography, databases, operating systems, compilers,
the internet protocol, GPS, radar, lasers, fibre optics, solar panels, wind turbines, hydroelectric dams, water purification"""
HISTORY = """the fall of the Roman Empire, the Renaissance, the Enlightenment, the Industrial Revolution, the Silk Road, feudal Japan, ancient Egypt,
the Ottoman Empire, the Aztecs, the Vikings, the Hanseatic League, the printing press in Europe, the abolition of slavery, women's suffrage,
the Great Depression, the Marshall Plan, decolonisation in Africa, the space race, the civil rights movement, the European Union,
stoicism, existentialism, utilitarianism, Plato's cave, the social contract, free will, the trolley problem, Buddhism, the Reformation,
Gothic architecture, Impressionism, Cubism, Baroque music, jazz, the novel, Greek tragedy, Shakespeare's comedies, Romantic poetry,
magical realism, oral tradition, inflation and wages, supply and demand, monopolies, trade tariffs, central banks, globalisation,
democracy in Athens, the separation of powers, freedom of the press, human rights, nationalism, propaganda, urbanisation, migration"""
TASKS = """reverses a string, checks whether a word is a palindrome, counts the vowels in a sentence, computes the factorial of a number,
returns the n-th Fibonacci number, finds the largest number in a list, removes duplicates from a list, sorts a list of names,
merges two sorted lists, flattens a nested list, counts the words in a text file, reads a CSV file and sums a column, parses a date,
checks whether a number is prime, lists all primes below n, computes the greatest common divisor, converts Celsius to Fahrenheit,
converts a number to binary, converts Roman numerals to integers, validates an email address, generates a random password,
finds the most common word in a text, groups words that are anagrams, checks balanced brackets, implements a stack, implements a queue,
implements binary search, implements bubble sort, implements merge sort, implements quicksort, implements a linked list,
inserts into a binary tree, finds the shortest path in a graph, does a depth-first search, computes the edit distance of two words,
multiplies two matrices, transposes a matrix, rotates a list by k places, finds two numbers that add up to a target,
finds the missing number from 1 to n, capitalises each word, counts the lines of code in a folder, downloads a web page, parses JSON,
writes a log file, retries a function three times, caches the results of a function, times how long a function takes,
draws a triangle of stars, plays rock paper scissors, simulates rolling two dice, shuffles a deck of cards, computes the median,
computes compound interest, finds the intersection of two sets, splits a list into chunks, checks whether two strings are anagrams"""
PROGRAMMING = """Python, Python, Python, Python, JavaScript, Java, C, C++, Go, Rust, TypeScript, Ruby, bash"""
CONCEPTS = """recursion, a closure, a decorator, a generator, list comprehensions, a hash table, big O notation, a race condition, a deadlock,
dependency injection, unit testing, version control, a REST API, a foreign key, database indexes, SQL joins, object-oriented programming,
inheritance, polymorphism, pointers, garbage collection, exceptions, regular expressions, threads and processes, async and await,
a virtual environment, Docker containers, continuous integration, the model-view-controller pattern, caching"""
PEOPLE_SHORT = "Anna, Ben, Clara, Diego, Emma, Farid, Grace, Hugo, Ines, Jonas, Kemal, Lena, Marta, Nico, Olga, Paul, Rosa, Sam, Tara, Wei"
ITEMS = "apples, books, chairs, cups, flowers, hats, keys, lamps, maps, pens, plates, shoes, stamps, tickets, toys, umbrellas"
FIRMS = "Alder Foods, Birch Motors, Cobalt Energy, Delta Toys, Elm Textiles, Fjord Shipping, Granite Bank, Harbour Media, Iris Optics, Juniper Air"
DETAILS = ["", "", "", " Keep it short.", " Use simple words.", " Give three examples.", " Write about 100 words.", " Use a bulleted list.",
           " Answer in one paragraph.", " Explain it step by step.", " Make it friendly.", " Be precise.", " Use a humorous tone."]  # fmt: skip

CHAT = {  # kind: the lists that fill {x}, and the frames
    "writing": (TOPICS, [
        "Write a short story about {x}.", "Write a poem about {x}.", "Write a haiku about {x}.", "Write a blog post introduction about {x}.",
        "Write an email to a friend about {x}.", "Write a letter to the editor about {x}.", "Describe {x} in vivid language.", "Write a product slogan to do with {x}.",
        "Draft a speech of one minute about {x}.", "Write the opening paragraph of a novel about {x}.", "Write a dialogue between two people about {x}.",
        "Write an essay outline on {x}.", "Write a tweet about {x}.", "Write a limerick about {x}.", "Write a review of a book on {x}.", "Write a diary entry about {x}.",
    ]),
    "everyday": (TOPICS, [
        "Give me five tips on {x}.", "What should I know about {x}?", "What are the pros and cons of {x}?", "Can you recommend books about {x}?",
        "How do I get started with {x}?", "What are common mistakes with {x}?", "Tell me something interesting about {x}.", "Why do people care about {x}?",
        "Hi! I have been thinking about {x} lately. Any advice?", "I am worried about {x}. What can I do?", "Make a checklist for {x}.", "Suggest some questions to ask about {x}.",
        "How would you explain {x} to a child?", "What gift fits someone who loves {x}?", "Plan a weekend around {x}.", "Tell me a joke about {x}.",
    ]),
    "roleplay": (ROLES, [
        "You are a {x}. Introduce yourself.", "Pretend to be a {x} and tell me about your day.", "Act as a {x}. I ask you for advice on my future. What do you say?",
        "Play the role of a {x} who has just won the lottery.", "Answer like a {x}: what is the meaning of life?", "As a {x}, explain how you make your living.",
        "Imagine you are a {x} on your first day of work. Describe it.", "You are a {x}. A child asks you why the sun shines. Answer in character.",
        "Speak as a {x} who has lost something precious.", "You are a {x} and I am your customer. Start the conversation.", "Be a {x} and give a toast at a wedding.",
        "I want you to act as a {x}. My first question is: what do you like most about your work?", "Write what a {x} would say about the internet.",
    ]),
    "stem": (SCIENCE, [
        "Explain {x}.", "Explain {x} to a ten-year-old.", "What are the key ideas behind {x}?", "Describe an experiment or demonstration about {x}.", "What are common misconceptions about {x}?",
        "How did scientists or engineers come to understand {x}?", "What are practical applications of {x}?", "Write three quiz questions with answers about {x}.",
        "Compare {x} with a related idea.", "Give an analogy for {x}.", "What open questions remain about {x}?", "Define the most important terms for {x}.",
    ]),
    "humanities": (HISTORY, [
        "Explain {x} in a few sentences.", "What were the causes and effects of {x}?", "Why does {x} still matter today?", "Write a short lesson plan about {x}.", "Compare two views on {x}.",
        "Who were the most important figures connected with {x}?", "What are the main criticisms of {x}?", "Describe {x} for a museum sign.", "Write a thesis statement about {x}.",
        "What can we learn from {x}?", "Discuss {x} from the point of view of an ordinary person.", "List five key facts about {x}.",
    ]),
    "coding": (TASKS, [
        "Write a {p} function that {x}.", "Write a {p} program that {x}.", "Implement a function in {p} that {x}, with comments.", "Show me {p} code that {x}.",
        "How do I write {p} code that {x}?", "Write a function that {x}, then explain how it works.", "Write a {p} function that {x} and a test for it.",
        "Write a {p} function that {x} without using library functions.", "What is the time complexity of code that {x}? Show it in {p}.",
    ]),
    "concepts": (CONCEPTS, [
        "What is {x} in programming?", "Explain {x} with a code example in {p}.", "When would you use {x}?", "What are the drawbacks of {x}?", "Explain {x} to a beginner.",
        "Give an interview answer on {x}.",
    ]),
}  # fmt: skip


def reasoning(rng: random.Random) -> str:
    """A small puzzle with names and numbers."""
    a, b, c = rng.sample(words_of(PEOPLE_SHORT), 3)
    x, y = rng.sample(words_of(ITEMS), 2)
    n, m = rng.sample(range(2, 15), 2)
    frames = [
        f"{a} is taller than {b}. {c} is shorter than {b}. Who is the tallest, and who is the shortest?",
        f"{a} finished the race before {b}, and {c} finished after {b}. Who came second?",
        f"All {x} in the shop are red. {a} bought something in the shop that is not red. Can it be one of the {x}? Explain.",
        f"{a} has {n} brothers. Each brother has {m} sisters. How many sisters does {a} have, if {a} is a girl?",
        f"If some {x} are {y} and all {y} are old, are some {x} old? Explain your reasoning.",
        f"{a} sits to the left of {b}. {c} sits to the right of {b}. Who sits in the middle?",
        f"Yesterday {a} had {n + m} {x}. Today {n} of them are missing, and {b} found two. What could have happened? Think step by step.",
        f"{a} always lies and {b} always tells the truth. One of them says: 'I have {n} {x}.' What can you conclude?",
        f"If it takes {n} machines {n} minutes to make {n} {x}, how long do {n * m} machines need for {n * m} {x}?",
        f"{a}, {b} and {c} each own one kind of thing: {x}, {y} or cats. {a} has no pets. {b} owns {x}. What does each own?",
        f"Which one does not belong with the others, and why: {x}, {y}, {rng.choice(words_of(ANIMALS))}, {rng.choice(words_of(ITEMS))}?",
        f"What comes next: {n}, {n + m}, {n + 2 * m}, {n + 3 * m}, ...? Explain.",
        f"{a} walks {n} steps north, {m} steps east and {n} steps south. Where is {a} now, seen from the start?",
        f"Today is the {n}th and a Monday. What weekday is the {n + m}th? Explain how you found it.",
    ]
    return rng.choice(frames)


def extraction(rng: random.Random) -> str:
    """A short made-up text or table with something to find in it."""
    people, firms, cities = (
        rng.sample(words_of(PEOPLE_SHORT), 3),
        rng.sample(words_of(FIRMS), 3),
        rng.sample(words_of(CITIES), 3),
    )
    numbers = rng.sample(range(3, 95), 3)
    rows = list(zip(people, firms, cities, numbers, strict=True))
    lines = "\n".join(f"{p} works for {f} in {c} and has {n} colleagues." for p, f, c, n in rows)
    table = "\n".join(f"{f},{c},{n}" for _, f, c, n in rows)
    note = (
        f"Dear {people[0]}, the meeting with {firms[0]} moved to {cities[0]} on {rng.randint(2, 28)} "
        f"{rng.choice(['March', 'May', 'July', 'October'])} at {rng.randint(8, 17)}:30. Please bring the {rng.choice(words_of(ITEMS))} "
        f"and {numbers[0]} copies of the report. {people[1]} will join from {cities[1]}. Regards, {people[2]}"
    )
    news = (
        f"{firms[0]} said on Tuesday that it will open a plant in {cities[0]} and hire {numbers[0]}0 people. Its rival {firms[1]}, based in "
        f"{cities[1]}, cut its forecast by {numbers[1]} per cent. Analyst {people[0]} of {firms[2]} called the news a surprise."
    )
    frames = [
        f"Extract all names of people from this text as a list:\n{lines}",
        f"Turn this text into a table with the columns name, company, city, colleagues:\n{lines}",
        f"Who has the most colleagues?\n\n{lines}",
        f"Return the following as JSON:\n{lines}",
        f"company,city,staff\n{table}\n\nWhich company has the fewest staff, and where is it?",
        f"Sort these lines by the number at the end, largest first:\n{table}",
        f"From this message, extract date, time, place and what to bring:\n\n{note}",
        f"Who wrote this message, to whom, and why?\n\n{note}",
        f"Write a short reply to this message:\n\n{note}",
        f"List every company and every city in the text.\n\n{news}",
        f"Is the news in this text good or bad for {firms[0]}? Answer with one word, then a reason.\n\n{news}",
        f"Write a headline for this news:\n\n{news}",
        f"Find all numbers in the text and say what they stand for.\n\n{news}",
        f"Rewrite this text in simpler English: {news}",
        f"Correct any mistakes in this sentence: {rng.choice(people)} have went to {cities[0]} for buy {numbers[0]} {rng.choice(words_of(ITEMS))}.",
    ]
    return rng.choice(frames)


def code_reading(rng: random.Random) -> str:
    """A few lines of code and a question about them."""
    n, m, item = rng.randint(3, 12), rng.randint(2, 9), rng.choice(words_of(ITEMS))
    names = rng.sample(words_of(PEOPLE_SHORT), 3)
    snippets = [
        f"total = 0\nfor i in range({n}):\n    if i % {m} == 0:\n        total += i\nprint(total)",
        f"{item} = {names}\nfor index, name in enumerate({item}):\n    print(index + {n}, name)",
        f"def area(width, height={m}):\n    return width * height\n\nprint(area({n}))",
        f"numbers = [x * x for x in range({n}) if x > {m}]\nprint(sum(numbers))",
        f"{item} = {{'{names[0]}': {n}, '{names[1]}': {m}}}\nprint(max({item}, key={item}.get))",
        f"def count(n):\n    if n == 0:\n        return {m}\n    return count(n - 1) + {n}\n\nprint(count({m}))",
        f"i = {n * m}\nwhile i > {m}:\n    i = i // 2\nprint(i)",
        f"let {item} = [{n}, {m}, {n + m}];\nconsole.log({item}.map(x => x * {m}).filter(x => x > {n}));",
        f"class Box:\n    def __init__(self, {item}):\n        self.{item} = {item}\n\nprint(Box({n}).{item} + {m})",
        f"SELECT name, count(*) FROM {item} WHERE price > {n * m} GROUP BY name ORDER BY name;",
        f"def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([{n}, {m}, {n + m}]))",
    ]
    frames = [
        "What does this code print?", "Explain this code line by line.", "Can you find a problem in this code?", "Rewrite this code so that it is easier to read.",
        "Add comments to this code.", "Write a test for this code.", "Turn this into a function with a good name.", "Translate this code into JavaScript or Python.",
    ]  # fmt: skip
    return f"{rng.choice(frames)}\n\n```\n{rng.choice(snippets)}\n```"


def chat(rng: random.Random) -> list[str]:
    """A share of every kind: writing, everyday, roleplay, science, humanities, coding, reasoning, reading code, extraction."""
    limits = {"concepts": 200}
    prompts: list[str] = []
    for kind, (subjects, frames) in CHAT.items():
        every = [
            frame.format(x=subject, p=rng.choice(words_of(PROGRAMMING)))
            + rng.choice([""] if kind == "coding" else DETAILS)
            for subject in words_of(subjects)
            for frame in frames
        ]
        prompts += rng.sample(every, min(len(every), limits.get(kind, 800)))
    prompts += sorted({reasoning(rng) for _ in range(1000)})[:800]
    prompts += [code_reading(rng) for _ in range(350)]
    prompts += [extraction(rng) for _ in range(800)]
    return prompts


def mathematics(count: int, rng: random.Random) -> list[str]:
    """Mathematics other than word problems: `count` prompts with numbers drawn at random."""
    prompts: list[str] = []
    while len(prompts) < count:
        a, b, c = (rng.randint(2, 12) for _ in range(3))
        big, small, percent = (
            rng.randint(100, 999),
            rng.randint(11, 99),
            rng.choice([5, 10, 12, 15, 20, 25, 30, 40, 60, 75]),
        )
        frames = [
            f"Solve for x: {a}x + {b} = {a * c + b}",
            f"Solve {a}x - {b} = {c}x + {big}.",
            f"Solve the system: x + y = {a + b}, x - y = {a - b}.",
            f"What are the roots of x^2 - {a + b}x + {a * b}?",
            f"What is {percent}% of {big}?",
            f"{small} is what percent of {big}? Round to one decimal.",
            f"A price rises from {small} to {big} dollars. By how many percent?",
            f"Calculate {big} * {small}.",
            f"Calculate ({big} + {small}) / {a}.",
            f"What is {big} - {small} * {a}?",
            f"Simplify the fraction {a * b}/{a * c}.",
            f"Add {a}/{b} and {c}/{b + 1}.",
            f"What is the area of a circle with radius {a}?",
            f"A rectangle is {small} cm long and {b} cm wide. Find its area and perimeter.",
            f"A right triangle has legs of {a} and {b}. How long is the hypotenuse?",
            f"Find the volume of a cylinder with radius {a} and height {b}.",
            f"A bag holds {a} red, {b} blue and {c} green balls. What is the probability of drawing a blue one?",
            f"Two dice are rolled. What is the probability that the sum is {a}?",
            f"A coin is tossed {a} times. What is the probability of no heads?",
            f"In how many ways can {a} people sit in a row?",
            f"What is the derivative of {a}x^{b} + {c}x?",
            f"Integrate {a}x^{b} with respect to x.",
            f"If f(x) = {a}x^2 - {b}x + {c}, find f({b}).",
            f"Find the mean and the median of {a}, {b}, {c}, {small}, {percent}.",
            f"What is the greatest common divisor of {big} and {a * b}?",
            f"Is {big} a prime number? Show why.",
            f"Convert {big} to binary.",
            f"What is the slope of the line through ({a}, {b}) and ({c + 12}, {small})?",
            f"What is the sum of the first {small} positive integers?",
            f"Solve the inequality {a}x + {b} < {big}.",
        ]
        prompts.append(rng.choice(frames))
    return prompts
