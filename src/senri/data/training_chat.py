"""What people ask a model that has nothing to do with what it read: there the memory must keep silent."""

from __future__ import annotations

PROMPTS = (
    "Hello!", "Good morning, how are you today?", "Who are you?", "What can you do?", "Thank you very much.",
    "What is 3 + 5?", "What is 12 times 4?", "How many days has a week?", "How many minutes are there in an hour?",
    "Is 17 a prime number?", "What is the square root of 81?", "Which is larger, 7 or 12?", "Count from one to five.",
    "What is the capital of Japan?", "What is the largest ocean?", "Which planet is closest to the sun?",
    "Who painted the Mona Lisa?", "Who wrote Hamlet?", "When did the Second World War end?", "What is gravity?",
    "Why is the sky blue?", "How do plants make their food?", "What is water made of?", "What does DNA stand for?",
    "How does a bicycle work?", "What is the boiling point of water?", "Name three fruits.", "Name a large animal.",
    "Name the colours of a rainbow.", "What is the opposite of hot?", "What is a synonym of happy?",
    "Translate 'good night' into French.", "How do you say thank you in German?", "What is the plural of mouse?",
    "Write a short poem about the sea.", "Write a sentence with the word lantern.", "Tell me a joke.",
    "Tell me a short story about a fox.", "Describe a winter morning.", "Write a haiku about autumn.",
    "Write a short letter to a friend.", "Give me a recipe for soup.", "How do I boil an egg?",
    "How do I make a cup of tea?", "How can I fall asleep more quickly?", "What should I eat for breakfast?",
    "Give me three tips for learning a language.", "How can I become better at chess?", "How do I write a good essay?",
    "What is a good name for a cat?", "Explain what a verb is.", "What is democracy?", "What is an atom?",
    "What is machine learning?", "Write a Python function that adds two numbers.", "What is a variable in programming?",
    "What does HTML stand for?", "Explain the difference between a list and a tuple.", "What is the meaning of life?",
    "Do you like music?", "What is your favourite book?", "Can you help me with my homework?", "Where is the sun?",
    "Who is the author of this text?", "What is the text about?", "Summarise what we talked about.",
    "What happened at the end?", "Who is the main character?", "What is his name?", "Where does the story take place?",
    "Why did he do that?", "Is the story true?", "Please repeat what I said.", "What did I ask you first?",
    "What is the password?", "What is my name?", "How old am I?", "Where do I live?", "What is the date today?",
)  # fmt: skip
