"""Sentences in English, French and German, written for the benchmark of the translator."""

from __future__ import annotations

SENTENCES: tuple[tuple[str, str, str], ...] = (
    ("Good morning.", "Bonjour.", "Guten Morgen."),
    ("Where is the station?", "Où est la gare ?", "Wo ist der Bahnhof?"),
    ("The train leaves at eight.", "Le train part à huit heures.", "Der Zug fährt um acht Uhr ab."),
    ("I would like a cup of coffee.", "Je voudrais une tasse de café.", "Ich hätte gern eine Tasse Kaffee."),
    ("How much does this cost?", "Combien est-ce que cela coûte ?", "Wie viel kostet das?"),
    ("My brother lives in Berlin.", "Mon frère habite à Berlin.", "Mein Bruder wohnt in Berlin."),
    ("The children are playing in the garden.", "Les enfants jouent dans le jardin.", "Die Kinder spielen im Garten."),
    ("It is raining today.", "Il pleut aujourd'hui.", "Heute regnet es."),
    ("Please close the window.", "Fermez la fenêtre, s'il vous plaît.", "Bitte schließen Sie das Fenster."),
    ("I have lost my key.", "J'ai perdu ma clé.", "Ich habe meinen Schlüssel verloren."),
    ("We are going to the sea tomorrow.", "Demain, nous allons à la mer.", "Morgen fahren wir ans Meer."),
    ("The soup is too hot.", "La soupe est trop chaude.", "Die Suppe ist zu heiß."),
    ("She reads a book every week.", "Elle lit un livre chaque semaine.", "Sie liest jede Woche ein Buch."),
    ("Can you help me?", "Pouvez-vous m'aider ?", "Können Sie mir helfen?"),
    ("The shop is closed on Sunday.", "Le magasin est fermé le dimanche.", "Der Laden ist am Sonntag geschlossen."),
    ("He works in a hospital.", "Il travaille dans un hôpital.", "Er arbeitet in einem Krankenhaus."),
    ("The cat sleeps under the table.", "Le chat dort sous la table.", "Die Katze schläft unter dem Tisch."),
    ("I do not understand the question.", "Je ne comprends pas la question.", "Ich verstehe die Frage nicht."),
    (
        "The bridge was built a hundred years ago.",
        "Le pont a été construit il y a cent ans.",
        "Die Brücke wurde vor hundert Jahren gebaut.",
    ),
    ("Turn left after the church.", "Tournez à gauche après l'église.", "Biegen Sie nach der Kirche links ab."),
    (
        "The meeting begins at nine o'clock.",
        "La réunion commence à neuf heures.",
        "Die Besprechung beginnt um neun Uhr.",
    ),
    ("I will call you this evening.", "Je t'appellerai ce soir.", "Ich rufe dich heute Abend an."),
    ("The water in the lake is very cold.", "L'eau du lac est très froide.", "Das Wasser im See ist sehr kalt."),
    ("Our neighbours have two dogs.", "Nos voisins ont deux chiens.", "Unsere Nachbarn haben zwei Hunde."),
    (
        "This road is dangerous in winter.",
        "Cette route est dangereuse en hiver.",
        "Diese Straße ist im Winter gefährlich.",
    ),
    (
        "The doctor gave me a medicine.",
        "Le médecin m'a donné un médicament.",
        "Der Arzt hat mir ein Medikament gegeben.",
    ),
    (
        "They bought a small house in the village.",
        "Ils ont acheté une petite maison au village.",
        "Sie haben ein kleines Haus im Dorf gekauft.",
    ),
    ("The bread is fresh.", "Le pain est frais.", "Das Brot ist frisch."),
    (
        "I forgot my umbrella on the bus.",
        "J'ai oublié mon parapluie dans le bus.",
        "Ich habe meinen Regenschirm im Bus vergessen.",
    ),
    (
        "The film was longer than I thought.",
        "Le film était plus long que je ne le pensais.",
        "Der Film war länger, als ich dachte.",
    ),
    ("Wash your hands before you eat.", "Lave-toi les mains avant de manger.", "Wasch dir die Hände, bevor du isst."),
    (
        "The battery must be charged once a week.",
        "La batterie doit être chargée une fois par semaine.",
        "Der Akku muss einmal pro Woche geladen werden.",
    ),
    (
        "Press the red button to stop the machine.",
        "Appuyez sur le bouton rouge pour arrêter la machine.",
        "Drücken Sie den roten Knopf, um die Maschine anzuhalten.",
    ),
    (
        "Do not open the door while the lamp is on.",
        "N'ouvrez pas la porte tant que la lampe est allumée.",
        "Öffnen Sie die Tür nicht, solange die Lampe leuchtet.",
    ),
    (
        "The engine makes a strange noise.",
        "Le moteur fait un bruit étrange.",
        "Der Motor macht ein seltsames Geräusch.",
    ),
    (
        "Keep this letter in a safe place.",
        "Gardez cette lettre en lieu sûr.",
        "Bewahren Sie diesen Brief an einem sicheren Ort auf.",
    ),
    ("The price includes breakfast.", "Le prix comprend le petit déjeuner.", "Der Preis schließt das Frühstück ein."),
    ("There is no light in the cellar.", "Il n'y a pas de lumière dans la cave.", "Im Keller gibt es kein Licht."),
    (
        "My grandmother was born in a small town.",
        "Ma grand-mère est née dans une petite ville.",
        "Meine Großmutter ist in einer kleinen Stadt geboren.",
    ),
    (
        "The teacher explained the exercise again.",
        "Le professeur a expliqué l'exercice encore une fois.",
        "Der Lehrer hat die Übung noch einmal erklärt.",
    ),
    ("The sun rises in the east.", "Le soleil se lève à l'est.", "Die Sonne geht im Osten auf."),
    (
        "If it snows, we will stay at home.",
        "S'il neige, nous resterons à la maison.",
        "Wenn es schneit, bleiben wir zu Hause.",
    ),
    ("I have been waiting for an hour.", "J'attends depuis une heure.", "Ich warte seit einer Stunde."),
    (
        "The birds fly south in autumn.",
        "Les oiseaux volent vers le sud en automne.",
        "Die Vögel fliegen im Herbst nach Süden.",
    ),
    ("He speaks three languages.", "Il parle trois langues.", "Er spricht drei Sprachen."),
    (
        "The answer is on the last page.",
        "La réponse est à la dernière page.",
        "Die Antwort steht auf der letzten Seite.",
    ),
    ("Nobody knows what happened.", "Personne ne sait ce qui s'est passé.", "Niemand weiß, was geschehen ist."),
    (
        "The museum is open until six in the evening.",
        "Le musée est ouvert jusqu'à six heures du soir.",
        "Das Museum ist bis sechs Uhr abends geöffnet.",
    ),
    (
        "We need more time and less noise.",
        "Il nous faut plus de temps et moins de bruit.",
        "Wir brauchen mehr Zeit und weniger Lärm.",
    ),
    (
        "The old man told us a story.",
        "Le vieil homme nous a raconté une histoire.",
        "Der alte Mann erzählte uns eine Geschichte.",
    ),
    (
        "Which of these apples is the sweetest?",
        "Laquelle de ces pommes est la plus sucrée ?",
        "Welcher dieser Äpfel ist der süßeste?",
    ),
    ("The wind blew all night.", "Le vent a soufflé toute la nuit.", "Der Wind wehte die ganze Nacht."),
    (
        "She put the flowers in a blue vase.",
        "Elle a mis les fleurs dans un vase bleu.",
        "Sie stellte die Blumen in eine blaue Vase.",
    ),
    ("I am sorry, I am late.", "Je suis désolé, je suis en retard.", "Es tut mir leid, ich bin zu spät."),
    (
        "The boat crosses the river twice a day.",
        "Le bateau traverse la rivière deux fois par jour.",
        "Das Boot überquert den Fluss zweimal am Tag.",
    ),
    (
        "Without glasses I cannot read the sign.",
        "Sans lunettes, je ne peux pas lire le panneau.",
        "Ohne Brille kann ich das Schild nicht lesen.",
    ),
    (
        "The city has grown a lot in recent years.",
        "La ville a beaucoup grandi ces dernières années.",
        "Die Stadt ist in den letzten Jahren stark gewachsen.",
    ),
    (
        "Tell him that the letter has arrived.",
        "Dis-lui que la lettre est arrivée.",
        "Sag ihm, dass der Brief angekommen ist.",
    ),
    (
        "A friend in need is a friend indeed.",
        "C'est dans le besoin qu'on reconnaît ses amis.",
        "Den wahren Freund erkennt man in der Not.",
    ),
    ("Thank you, and see you soon.", "Merci, et à bientôt.", "Danke, und bis bald."),
)
LANGUAGES = ("en", "fr", "de")


def pairs(source: str, target: str) -> list[tuple[str, str]]:
    """Sentences and their translations, for two codes of LANGUAGES."""
    places = LANGUAGES.index(source), LANGUAGES.index(target)
    return [(row[places[0]], row[places[1]]) for row in SENTENCES]
