"""Other ways to ask what :data:`senri.data.training_facts.TELLINGS` tell, as people ask who do not remember in which
words a thing was told. As the facts, none is worded as the held-out tests are.
"""

from __future__ import annotations

import re

from senri.data.training_facts import Telling

# of "What is the NOUN of KEY?"
NAMED = (
    "What is {key}'s {noun}?",
    "Do you know the {noun} of {key}?",
    "Please tell me {key}'s {noun}.",
    "Which {noun} does {key} have?",
)

OTHERS: dict[str, tuple[str, ...]] = {
    "What is the secret key mentioned above?": (
        "Which secret key was mentioned?", "Do you remember the secret key?", "Please tell me the secret key.",
    ),
    "What is the secret key of {key} mentioned above?": (
        "What is the secret key of {key}?", "What is {key}'s secret key?", "Do you remember {key}'s secret key?",
        "Tell me the secret key of {key}.",
    ),
    "What is the pass key mentioned above?": (
        "Which pass key was I told to remember?", "Can you repeat the pass key?", "What was the pass key?",
    ),
    "What is the magic number?": (
        "Which number is magic?", "Do you remember the magic number?", "Tell me the magic number.",
    ),
    "What is the secret key for the {key}?": (
        "What is the {key}'s secret key?", "Which secret key belongs to the {key}?", "Give me the key for the {key}.",
    ),
    "Which number has the room of {key}?": (
        "What is {key}'s room number?", "In which room can I find {key}?", "What number is written on {key}'s room?",
    ),
    "What must one dial to open the safe of {key}?": (
        "What is the combination of {key}'s safe?", "How do I open {key}'s safe?",
        "Which number opens the safe of {key}?",
    ),
    "Where does {key} live?": (
        "In which town does {key} live?", "Where is {key}'s house?", "Do you know where {key} lives?",
        "Where would I have to go to visit {key}?",
    ),
    "Where does {key} come from?": (
        "What is the place {key} comes from?", "Where is {key} from?", "Can you tell me where {key} is from?",
    ),
    "To which city did {key} travel last winter?": (
        "Where did {key} go last winter?", "What was the destination of {key}'s winter journey?",
        "Where was {key} last winter?",
    ),
    "Where was {key} married?": (
        "In which town did {key} marry?", "Where did {key}'s wedding take place?", "Do you know where {key} married?",
    ),
    "What does {key} own?": (
        "Which thing belongs to {key}?", "What is in {key}'s possession?", "What does {key} have?",
    ),
    "What was {key} given for a birthday?": (
        "What birthday present did {key} get?", "Which gift did {key} receive?", "What did {key} get for a birthday?",
    ),
    "What has {key} hidden in the cellar?": (
        "What is in {key}'s cellar?", "Which thing did {key} hide?", "What would I find in the cellar of {key}?",
    ),
    "Which animal does {key} keep at home?": (
        "What pet does {key} have?", "What is {key}'s pet?", "Does {key} have an animal, and which?",
    ),
    "Of which animal is {key} afraid?": (
        "What animal scares {key}?", "Which animal frightens {key} most?", "What is {key} afraid of?",
    ),
    "Which colour is the coat of {key}?": (
        "What colour does {key} wear?", "What is the colour of {key}'s coat?", "What does {key}'s coat look like?",
    ),
    "In which colour is the door of {key} painted?": (
        "What colour is {key}'s door?", "How is the door of {key} painted?", "How do I recognise {key}'s door?",
    ),
    "What does {key} teach?": (
        "Which subject does {key} teach?", "What can one learn from {key} at school?", "What is {key}'s subject?",
    ),
    "At what is nobody better than {key}?": (
        "What is {key} best at?", "What is {key}'s greatest skill?", "In what does {key} excel?",
    ),
    "What did {key} study?": (
        "Which subject did {key} study?", "What were {key}'s studies in?", "To what did {key} devote three years?",
    ),
    "In which year was {key} elected mayor?": (
        "When did {key} become mayor?", "Since when was {key} mayor?", "What year did {key} win the election?",
    ),
    "In which year did the ship of {key} sink?": (
        "When did {key}'s ship go down?", "When was {key}'s ship lost?", "What year did {key} lose the ship?",
    ),
    "Whose sister is {key}?": (
        "Who has {key} for a sister?", "Who is {key} the sister of?", "Name the one whose sister {key} is.",
    ),
    "For whom does {key} work?": (
        "Who employs {key}?", "Who is {key}'s employer?", "Who does {key} work for?",
    ),
    "Who bought the house of {key}?": (
        "To whom was {key}'s house sold?", "Who owns {key}'s house now?", "Who is the buyer of {key}'s house?",
    ),
    "Who is the owner of the {key}?": (
        "To whom does the {key} belong?", "Who owns the {key}?", "Whose {key} is it?",
    ),
    "What is the word for {key} in their language?": (
        "How do they say {key} in their language?", "What do they call a {key}?",
        "Translate {key} into their language.",
    ),
    "What is there for dinner on Sundays at the house of {key}?": (
        "What does {key} have on Sundays?", "What is {key}'s Sunday dinner?", "What comes on {key}'s table on Sundays?",
    ),
    "What did {key} order at the inn?": (
        "What did {key} have at the inn?", "What was {key}'s order?", "What did the inn serve {key}?",
    ),
    "What disgusts {key}?": (
        "Which dish can {key} not stand?", "What does {key} hate to see on a plate?", "What is {key} disgusted by?",
    ),
    "What did {key} serve to the guests?": (
        "What did the guests of {key} get?", "What was served at {key}'s?", "With what did {key} feed the guests?",
    ),
    "What had {key} been before the war?": (
        "What was {key} before the war?", "What did {key} do before the war?", "What was {key}'s trade before the war?",
    ),
    "What was the father of {key}?": (
        "What did {key}'s father do?", "What was {key}'s father by trade?", "Do you know what {key}'s father was?",
    ),
    "As what was {key} disguised?": (
        "What was {key}'s disguise?", "What did {key} pretend to be at sea?", "How did {key} disguise themselves?",
    ),
    "What did {key} dream of becoming?": (
        "What did {key} want to be as a child?", "What was {key}'s childhood dream?", "What did {key} hope to become?",
    ),
    "Whom is {key} going to marry?": (
        "Who is {key} engaged to?", "Who will {key} marry?", "What is the name of {key}'s future spouse?",
    ),
    "Who taught {key} to read?": (
        "From whom did {key} learn to read?", "Who was it that taught {key} reading?",
        "Who gave {key} reading lessons?",
    ),
    "To whom does {key} owe money?": (
        "Who is {key} in debt to?", "Who lent {key} money?", "Who does {key} have to pay back?",
    ),
    "To whom must one write if anything happens to {key}?": (
        "Who must be told if something happens to {key}?", "Who is {key}'s contact?",
        "Who should get a letter if {key} has an accident?",
    ),
    "Where did the brother of {key} settle?": (
        "Where does {key}'s brother live?", "In which town is {key}'s brother?", "Where did {key}'s brother go?",
    ),
    "Where will {key} be buried?": (
        "Where will {key}'s grave be?", "In which place will {key} rest?", "What place has {key} chosen for the grave?",
    ),
    "Where were the letters for {key} posted?": (
        "Where did {key}'s letters come from?", "From which town did {key} get letters?",
        "What was the postmark on {key}'s letters?",
    ),
    "What stands on the desk of {key}?": (
        "What is on {key}'s desk?", "Which thing has {key} on the desk?", "What would I see on {key}'s desk?",
    ),
    "What did {key} leave on the train?": (
        "What did {key} lose on the train?", "What did {key} forget?", "Which thing of {key}'s stayed on the train?",
    ),
    "What does {key} treasure most?": (
        "What is dearest to {key}?", "What is {key}'s greatest treasure?", "Which thing means most to {key}?",
    ),
    "Which animal once bit {key}?": (
        "What bit {key}?", "What was {key} bitten by?", "By which animal was {key}'s hand hurt?",
    ),
    "Which colour are the eyes of {key}?": (
        "What colour are {key}'s eyes?", "What is {key}'s eye colour?", "What do {key}'s eyes look like?",
    ),
    "Under which name did {key} write for the papers?": (
        "What was {key}'s pen name?", "How did {key} sign articles?", "Which name did {key} use in the papers?",
    ),
    "For which number must one ask to find {key}?": (
        "Which number leads to {key}?", "What number do I ask for when I look for {key}?", "What is {key}'s number?",
    ),
    "What is the number of the ticket of {key}?": (
        "Which ticket does {key} have?", "What is {key}'s ticket number?", "What number is on {key}'s ticket?",
    ),
    "With which code does {key} open the gate?": (
        "What is {key}'s gate code?", "How does {key} open the gate?", "What does {key} type in at the gate?",
    ),
    "Under what is the account of {key} kept?": (
        "What is {key}'s account?", "How do I find {key}'s account?", "Which account is {key}'s?",
    ),
    "With which word does {key} sign every letter?": (
        "How does {key} sign letters?", "What stands at the end of {key}'s letters?", "What does {key} sign with?",
    ),
    "When does the train of {key} leave?": (
        "What day does {key}'s train go?", "When does {key} depart?", "When must {key} be at the station?",
    ),
    "When did {key} promise to be back?": (
        "When will {key} be back?", "What day is {key} expected back?", "When does {key} return?",
    ),
    "What is the date of the letter that {key} sent?": (
        "When did {key} write the letter?", "How is {key}'s letter dated?", "When was {key}'s letter sent?",
    ),
    "When does the trial of {key} begin?": (
        "What day must {key} be in court?", "When is {key}'s trial?", "When will {key} stand trial?",
    ),
    "Of what is the bed of {key} made?": (
        "What is {key}'s bed made of?", "What material is {key}'s bed?", "In what kind of bed does {key} sleep?",
    ),
    "Of what is the box that {key} has under the bed?": (
        "What is {key}'s box made of?", "What material is the box under {key}'s bed?",
        "What kind of box does {key} have?",
    ),
    "In what does {key} deal?": (
        "What does {key} sell?", "What goods does {key} trade in?", "What can one buy from {key}?",
    ),
    "How much did {key} lose at cards?": (
        "What did {key} lose at cards?", "What did the card game cost {key}?", "What sum did {key} gamble away?",
    ),
    "How much did {key} pay for the farm?": (
        "What did {key}'s farm cost?", "What was the price of {key}'s farm?", "For how much did {key} buy the farm?",
    ),
    "How high is the rent that {key} pays?": (
        "What rent does {key} pay?", "How much is {key}'s rent?", "What does {key} pay the landlord?",
    ),
    "Which sum stands in the will of {key}?": (
        "How much does {key} leave in the will?", "What sum did {key} bequeath?", "How much is in {key}'s will?",
    ),
    "How many steps are there up to the room of {key}?": (
        "How many steps must one climb to {key}?", "How many stairs lead to {key}'s room?",
        "How many steps up is {key}?",
    ),
    "How many ships did {key} count?": (
        "What number of ships did {key} see?", "How many ships were there by {key}'s count?",
        "What was {key}'s count of the ships?",
    ),
    "What is the combination of the locker of {key}?": (
        "How do I open {key}'s locker?", "Which number opens {key}'s locker?", "What is {key}'s locker combination?",
    ),
    "Which number had the regiment of {key}?": (
        "In which regiment was {key}?", "What was {key}'s regiment?", "What regiment did {key} serve in?",
    ),
    "How is the file on {key} marked?": (
        "Which file is about {key}?", "What is the mark on {key}'s file?", "Where do I find the file on {key}?",
    ),
    "What is the plate of the car of {key}?": (
        "What is {key}'s number plate?", "How do I recognise {key}'s car?", "Which plate does {key}'s car have?",
    ),
    "Which label carries the parcel for {key}?": (
        "What is written on {key}'s parcel?", "How is {key}'s parcel labelled?", "Which parcel is for {key}?",
    ),
    "Under which call sign can {key} be reached?": (
        "What is {key}'s call sign?", "How can {key} be reached by radio?", "How do I get in touch with {key}?",
    ),
    "Which word is underlined in the diary of {key}?": (
        "What did {key} underline?", "What word stands out in {key}'s diary?", "What is underlined in {key}'s diary?",
    ),
    "How did {key} name the boat?": (
        "What is {key}'s boat called?", "What name did {key} give the boat?", "What is the name of {key}'s boat?",
    ),
    "To which name does the dog of {key} answer?": (
        "What is {key}'s dog called?", "What is the name of {key}'s dog?", "How does {key} call the dog?",
    ),
    "What is engraved on the ring of {key}?": (
        "What does {key}'s ring say?", "Which word is on {key}'s ring?", "What can be read on {key}'s ring?",
    ),
    "How is the estate of {key} called?": (
        "What is the name of {key}'s estate?", "Which estate belongs to {key}?", "What does {key} call the estate?",
    ),
    "What sign did {key} give to the watchman?": (
        "How did {key} signal to the watchman?", "What was {key}'s sign?", "What did the watchman get from {key}?",
    ),
    "What did {key} whisper before dying?": (
        "What were {key}'s last words?", "What did {key} say at the end?", "Which words did {key} die with?",
    ),
    "Who is the godfather of {key}?": (
        "Who is {key}'s godfather?", "Who stood godfather to {key}?", "What is the name of {key}'s godfather?",
    ),
    "In whose company was {key} seen last?": (
        "Who was with {key} last?", "Who was {key} last seen with?", "Who accompanied {key} the last time?",
    ),
    "Whom does {key} suspect?": (
        "Who does {key} think did it?", "Who is {key}'s suspect?", "Of whom is {key} suspicious?",
    ),
    "To whom went the part of {key}?": (
        "Who plays {key}?", "Who got {key}'s part?", "Which actor is {key} in the play?",
    ),
    "Where did {key} flee?": (
        "Where is {key} hiding?", "Where did {key} escape to?", "To which place did {key} run away?",
    ),
    "Where has the firm of {key} its office?": (
        "Where is {key}'s office?", "Where is {key}'s firm?", "In which town is the office of {key}'s company?",
    ),
    "Where did {key} learn to swim?": (
        "In which place was {key} taught swimming?", "Where did {key} first swim?",
        "Where did {key} take to the water?",
    ),
    "For what did {key} exchange the horse?": (
        "What did {key} get for the horse?", "What was {key}'s horse traded for?",
        "What does {key} have instead of a horse?",
    ),
    "What did the thief take from the house of {key}?": (
        "What was stolen from {key}?", "What is missing from {key}'s house?",
        "Which thing did {key} lose to the thief?",
    ),
    "What did {key} win at the fair?": (
        "Which prize did {key} get?", "What was {key}'s prize?", "What did {key} carry home from the fair?",
    ),
    "Which animal is painted on the shield of {key}?": (
        "What is on {key}'s shield?", "What does {key}'s shield show?", "What animal does {key} bear in arms?",
    ),
    "Of which animal did {key} dream?": (
        "What spoke to {key} in the dream?", "What animal could speak in {key}'s dream?", "What did {key} dream about?",
    ),
    "Which colour is the ribbon on the hat of {key}?": (
        "What colour is {key}'s ribbon?", "What ribbon does {key} wear?",
        "What is the colour of the ribbon on {key}'s hat?",
    ),
    "In which colour did {key} come to the ball?": (
        "What colour did {key} wear at the ball?", "How was {key} dressed for the ball?",
        "What was the colour of {key}'s costume?",
    ),
    "What does {key} cook every Friday?": (
        "What is {key}'s Friday dish?", "What comes out of {key}'s kitchen on Fridays?",
        "What do {key}'s guests get on Fridays?",
    ),
    "What was left in the larder of {key}?": (
        "What did {key} still have in the larder?", "What remained of {key}'s stores?", "What is in {key}'s larder?",
    ),
    "As what was {key} introduced to us?": (
        "What were we told that {key} was?", "What was {key} said to be?", "What did they say {key} was?",
    ),
    "What is the husband of {key}?": (
        "What does {key}'s husband do?", "What is {key}'s husband by trade?", "To what kind of man is {key} married?",
    ),
    "In what does {key} give lessons?": (
        "What does {key} give lessons in?", "What can one learn from {key}?", "Which lessons does {key} offer?",
    ),
    "On what has {key} written a book?": (
        "What is {key}'s book about?", "What subject did {key} write on?", "What does {key}'s book treat of?",
    ),
    "For what was the badge of {key} exchanged?": (
        "What is {key}'s new badge?", "Which badge did {key} get instead?", "What replaced {key}'s badge?",
    ),
    "Which word opens the safe of {key}?": (
        "How do I open the safe of {key}?", "What word is {key}'s safe set to?",
        "What is the combination of {key}'s safe?",
    ),
    "What must those whisper who come to see {key} at night?": (
        "What do I have to whisper to see {key}?", "How does one get to {key} at night?",
        "What is whispered at {key}'s door?",
    ),
    "With which answer do the servants of {key} let one in?": (
        "What do {key}'s servants want to hear?", "How do I get past {key}'s servants?",
        "What must I answer at {key}'s door?",
    ),
    "What did the telegram of {key} say?": (
        "What did {key} wire?", "What was in {key}'s telegram?", "Which message did {key} send?",
    ),
    "Which watchword is asked for at the gate of {key}?": (
        "What is the watchword at {key}'s gate?", "What must I say at {key}'s gate?", "Which word opens {key}'s gate?",
    ),
    "What is the money called in the letters of {key}?": (
        "What does {key} call the money?", "What is {key}'s word for the money?", "How does {key} write about money?",
    ),
    "By which phrase do the agents of {key} know each other?": (
        "What do {key}'s agents say to each other?", "How do I recognise {key}'s agents?",
        "What is the phrase of {key}'s agents?",
    ),
    "With what should a letter to {key} begin?": (
        "How should I begin a letter to {key}?", "What are the first words of a letter to {key}?",
        "How does one address {key}?",
    ),
    "Which countersign does one give to speak to {key}?": (
        "What is {key}'s countersign?", "How do I get to speak to {key}?", "What must be said before one meets {key}?",
    ),
    "Which word was written on the door of {key}?": (
        "What was chalked on {key}'s door?", "What stood on the door of {key}?",
        "What did somebody write on {key}'s door?",
    ),
    "What can the parrot of {key} say?": (
        "What does {key}'s parrot say?", "Which word does {key}'s parrot know?", "What has {key}'s parrot learned?",
    ),
    "What does {key} fear above all?": (
        "What is {key} most afraid of?", "What is {key}'s greatest fear?", "What frightens {key}?",
    ),
    "What did {key} bring home?": (
        "What did {key} come home with?", "What did {key} have on returning?", "Which thing did {key} take home?",
    ),
    "What did {key} give the children for supper?": (
        "What did {key}'s children have for supper?", "What was for supper at {key}'s?",
        "What did {key} make for the children?",
    ),
    "For which dish did {key} ask?": (
        "What did {key} keep asking for?", "Which dish did {key} want again and again?",
        "What could {key} not get enough of?",
    ),
    "What did {key} become?": (
        "What was {key} in the end?", "What became of {key}?", "What does {key} do now?",
    ),
    "For which place does {key} long?": (
        "Where would {key} like to be?", "Where does {key} want to go?", "What place does {key} miss?",
    ),
}  # fmt: skip


def other_questions(telling: Telling) -> tuple[str, ...]:
    """Of one telling: each ends with its mark, ``{key}`` stands for whose it is."""
    if telling.question in OTHERS:
        return OTHERS[telling.question]
    named = re.fullmatch(r"What is the (.+) of \{key\}\?", telling.question)
    assert named is not None, telling.question
    return tuple(question.replace("{noun}", named[1]) for question in NAMED)
