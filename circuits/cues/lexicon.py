"""Short lists of English words for the tagger: closed classes whole, verbs and adjectives by how common they are."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words(
    "the a an this that these those my your his her its our their some any no every each either neither both all "
    "half several many few most more much another such what which whose enough other one two three four five six "
    "seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand million"
)
PLURAL_PRONOUNS = _words("i you we they")
SINGULAR_PRONOUNS = _words("he she it there this that")
OTHER_PRONOUNS = _words(
    "me him us them mine yours hers ours theirs who whom which whoever myself himself herself itself"
)
NOUN_PRONOUNS = _words(
    "nobody anybody somebody everybody nothing anything something everything everyone someone anyone"
)
OTHER = _words(
    "in on at by for from with without into onto over under of off up down out about above across after against "
    "along among around as before behind below beneath beside between beyond despite during except inside like "
    "near outside past per since than through throughout to toward towards until upon via within and or but nor "
    "so yet if because although though while when where whether unless once not n't never always often sometimes "
    "usually very too also just only even still already soon now then here there again ever almost quite rather "
    "perhaps maybe however far else how why yes well away back together twice instead later today tonight abroad "
    "alone home next later nearby"
)
"""Prepositions, conjunctions and adverbs: neither nouns nor verbs."""
BETWEEN = _words(
    "not n't never always often sometimes usually also just only even still already soon now then again ever"
)
"""Adverbs that stand between a subject and its verb."""
ADJECTIVES = _words(
    "old new young good bad better best worse worst big small large little long short high low great strong weak "
    "hot cold warm cool wet dry rich poor easy hard early late early fast slow quick loud quiet dark light bright "
    "heavy soft sharp clean dirty full empty open free busy happy sad angry afraid tired sick ill healthy safe "
    "dangerous dear cheap expensive important main major minor public private local national foreign common rare "
    "strange usual normal simple clear right wrong true false real fine nice kind brave proud calm fresh raw "
    "sweet sour bitter deep shallow thick thin wide narrow tall tiny huge whole final first second third last "
    "former same different similar own red blue green yellow black white brown grey gray pink orange purple "
    "golden wooden broken frozen hidden able ready sure certain likely favourite favorite single double entire "
    "modern ancient recent current human male female blind deaf dead alive born retired rude polite"
)
MODALS = _words("can could will would shall should may might must ought 'll 'd wo ca cannot")
PRESENT_AUXILIARIES = _words("am is are has have do does 'm 're 've 's")
PAST_AUXILIARIES = _words("was were had did been being")
NAMES_IN_S = _words("james charles thomas louis lucas agnes nicholas dennis chris francis paris texas athens brussels")
SINGULAR_IN_S = _words(
    "news gas bus lens physics economics mathematics politics athletics statistics linguistics electronics series "
    "species means chaos bias canvas atlas christmas yes always perhaps"
)
IRREGULAR_PLURALS = _words(
    "children people men women mice feet teeth geese oxen cattle police lice data criteria phenomena media "
    "bacteria policemen policewomen firemen fishermen businessmen businesswomen gentlemen wives knives lives "
    "wolves"
)
TITLES = _words("mr mrs ms miss dr prof sir madam saint st")
ING_NOUNS = _words(
    "morning evening building thing king ring spring wing string ceiling wedding meeting painting feeling "
    "clothing training hearing opening beginning ending warning housing lightning pudding sibling being"
)
IRREGULAR_PASTS = _words(
    "arose ate awoke bade beat became began bent bet bit bled blew bore bought bound bred broke broken brought "
    "built burnt came caught chose chosen clung crept cut dealt drew drawn drank drunk drove driven dug dreamt "
    "fed fell fallen felt fled flew flown flung forbade forgave forgot forgotten fought found froze gave given "
    "gone got gotten grew grown heard held hid hidden hit hung hurt kept knelt knew known laid lain lay lay leant "
    "led left lent let lit lost made meant met paid put quit ran rang read rid risen rode rose said sang sank sat "
    "saw seen sent set sewn shed shone shook shaken shot showed shown shrank shut slept slid slung sold sought "
    "spat sped spent spilt split spoke spoken spread sprang stole stolen stood struck stuck stung stank strode "
    "strove sung sunk swam swept swore sworn swung taken taught thought threw thrown told took tore torn trod "
    "understood undone went wept withdrew woke woken won wore worn wound wove written wrote wrung"
)
VERBS = _words(
    "accept achieve act add admire admit adore advise affect agree aim allow announce answer appear apply argue "
    "arrange arrest arrive ask assist assume attack attend attract avoid bake balance ban bark bathe be bear beat "
    "become begin behave believe belong bend bite blame bloom blow boil bore borrow bother break breathe bring "
    "broadcast brush build burn burst buy call calm camp care carry catch cause celebrate chair change charge "
    "chase check cheer chew choose claim clean clear climb close collapse collect come comfort command compare "
    "compete complain complete concern conclude conduct confirm connect consider consist contain continue control "
    "cook copy correct cost count cover crash create cross cry cut dance dare deal decide declare decline defend "
    "delay deliver demand deny depend describe deserve design destroy develop die differ dig direct disagree "
    "disappear discover discuss dislike divide draw dream dress drink drive drop dry earn eat edit emerge employ "
    "enable encourage end enjoy enter escape establish examine exist expand expect explain explore express extend "
    "face fade fail fall fear feed feel fight fill find finish fit fix float flow fly fold follow forget forgive "
    "form gain gather get give go govern grow guard guess guide handle hang happen hate have head hear heat help "
    "hide hire hit hold hope hunt hurry hurt identify ignore imagine improve include increase influence inform "
    "intend interview introduce invent investigate invite involve join judge jump keep kick kill kiss knock know "
    "lack land last laugh launch lay lead lean learn leave lend let lie lift like link listen live load lock look "
    "lose love make manage march mark marry match matter mean measure meet melt mention mind miss mix move name "
    "need note notice obey observe obtain occur offer open operate oppose order organise organize own paint park "
    "pass pay perform permit pick place plan plant play please point possess pour practise practice praise prefer "
    "prepare present press prevent print produce promise promote protect protest prove provide publish pull push "
    "put puzzle question race rain raise reach react read realise realize receive recognise recognize recommend "
    "record recover reduce refer reflect refuse regard reject relate release rely remain remember remind remove "
    "rent repair repeat replace reply report represent request require rescue research respect respond rest "
    "result retire return reveal review ride ring rise risk rob rule run rush sail save say search see seek seem "
    "sell send separate serve set settle shake shape share shine shoot shop shout show shut sign sing sink sit "
    "sleep smell smile smoke snow solve sort sound speak spend split spread stand stare start state stay steal "
    "step stick stop strike study succeed suffer suggest suit supervise supply support suppose surprise surround "
    "survive swim take talk taste teach tell tend test thank think threaten throw touch trade train translate "
    "travel treat tremble trust try turn understand unite use value vanish visit vote wait wake walk want warm "
    "warn wash waste watch water wear weigh welcome whisper whistle win wish wonder work worry wrap write yell"
)
