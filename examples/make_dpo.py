"""Makes ``dpo.jsonl``: 480 preference pairs, half English and half Chinese, to align a very small model with DPO.

Every pair is one question with two answers. The chosen answer is correct, to the point and courteous; the rejected one
has a typical fault of assistants: it evades, is rude, rambles, repeats the question, or is in the wrong language. The
answers are put together from a table of facts and several wordings of each style, because a model of a few million
parameters learns a style within a minute or two and can show it on questions it has not seen, but learns no facts.

No two pairs ask the same question in the same words, so any split of the lines holds out questions not seen before,
though mostly on topics seen before. Within every fault the chosen answer is the longer one (in bytes) in half of the
pairs: a summed log probability falls with length, and a pair that length alone decides would teach nothing. Rejected
answers often name the topic too, so naming it does not give them away. The lines are shuffled, the languages evenly,
and the seed is fixed: the same command writes the same file.

    python examples/make_dpo.py                  # rewrites examples/dpo.jsonl
    python examples/make_dpo.py --out pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import mean
from typing import NamedTuple

SEED = 20240
PHRASINGS_PER_TOPIC = 4  # 60 topics x 4 phrasings x 2 languages = 480 pairs
SYSTEM_SHARE = EARLIER_TURN_SHARE = 0.15
LENGTHS = {"en": (40, 160), "zh": (15, 60)}  # of an answer, in characters
FAULTS = {"evasive": 54, "rude": 52, "rambling": 52, "repeating": 50, "language": 32}  # pairs per language

# Three lines a topic: English question | the same as a clause; English fact; Chinese question | Chinese fact.
TOPICS = """
How many days are there in a week? | how many days there are in a week
A week has seven days, from Monday to Sunday.
一周有几天 | 一周有七天，从星期一到星期日。
How many months are there in a year? | how many months there are in a year
A year has twelve months, from January to December.
一年有几个月 | 一年有十二个月。
How many minutes are there in an hour? | how many minutes there are in an hour
An hour has sixty minutes.
一小时有多少分钟 | 一小时有六十分钟。
How many seconds are there in a minute? | how many seconds there are in a minute
A minute has sixty seconds.
一分钟有多少秒 | 一分钟有六十秒。
How many sides does a hexagon have? | how many sides a hexagon has
A hexagon has six sides and six corners.
六边形有几条边 | 六边形有六条边和六个角。
How many legs does a spider have? | how many legs a spider has
A spider has eight legs, two more than an insect.
蜘蛛有几条腿 | 蜘蛛有八条腿，比昆虫多两条。
How many legs does an ant have? | how many legs an ant has
An ant is an insect and has six legs.
蚂蚁有几条腿 | 蚂蚁是昆虫，有六条腿。
At what temperature does water boil? | at what temperature water boils
At sea level, water boils at 100 degrees Celsius.
水在多少度沸腾 | 在标准大气压下，水在100摄氏度沸腾。
At what temperature does water freeze? | at what temperature water freezes
Pure water normally freezes at 0 degrees Celsius.
水在多少度结冰 | 纯水通常在0摄氏度结冰。
What is the capital of France? | what the capital of France is
The capital of France is Paris, on the river Seine.
法国的首都是哪里 | 法国的首都是巴黎，位于塞纳河畔。
What is the capital of Japan? | what the capital of Japan is
The capital of Japan is Tokyo.
日本的首都是哪里 | 日本的首都是东京。
What is the capital of Italy? | what the capital of Italy is
The capital of Italy is Rome.
意大利的首都是哪里 | 意大利的首都是罗马。
What is the capital of Egypt? | what the capital of Egypt is
The capital of Egypt is Cairo, on the river Nile.
埃及的首都是哪里 | 埃及的首都是开罗，位于尼罗河畔。
What is the capital of Canada? | what the capital of Canada is
The capital of Canada is Ottawa, in Ontario.
加拿大的首都是哪里 | 加拿大的首都是渥太华，在安大略省。
What is the capital of Australia? | what the capital of Australia is
The capital of Australia is Canberra, not Sydney.
澳大利亚的首都是哪里 | 澳大利亚的首都是堪培拉，不是悉尼。
Which planet is the largest? | which planet is the largest
Jupiter is the largest planet in our solar system.
哪颗行星最大 | 木星是太阳系中最大的行星。
Which planet is closest to the Sun? | which planet is closest to the Sun
Mercury is the planet closest to the Sun.
哪颗行星离太阳最近 | 水星是离太阳最近的行星。
How many planets orbit the Sun? | how many planets orbit the Sun
Eight planets orbit the Sun, from Mercury to Neptune.
太阳系有几颗行星 | 太阳系有八颗行星，从水星到海王星。
Which ocean is the largest? | which ocean is the largest
The Pacific Ocean is the largest ocean on Earth.
世界上最大的海洋是哪个 | 太平洋是世界上最大的海洋。
Which mountain is the highest? | which mountain is the highest
Mount Everest is the highest mountain above sea level.
世界上最高的山是哪座 | 珠穆朗玛峰是世界上海拔最高的山。
What do honey bees make from nectar? | what honey bees make from nectar
Honey bees turn the nectar of flowers into honey.
蜜蜂用花蜜做什么 | 蜜蜂把花蜜酿成蜂蜜。
What do blue and yellow paint make? | what blue and yellow paint make
Blue and yellow paint mixed together make green.
蓝色和黄色颜料混合是什么颜色 | 蓝色和黄色颜料混合成绿色。
What do red and white paint make? | what red and white paint make
Red and white paint mixed together make pink.
红色和白色颜料混合是什么颜色 | 红色和白色颜料混合成粉色。
Which gas do plants need for photosynthesis? | which gas plants need for photosynthesis
Plants take in carbon dioxide for photosynthesis.
植物光合作用需要什么气体 | 植物光合作用吸收二氧化碳。
What is the chemical formula of water? | what the chemical formula of water is
It is H2O: two hydrogen atoms and one oxygen atom.
水的化学式是什么 | 水的化学式是H2O，含两个氢原子和一个氧原子。
What is the chemical symbol of gold? | what the chemical symbol of gold is
The chemical symbol of gold is Au.
金的元素符号是什么 | 金的元素符号是Au。
What is the chemical symbol of iron? | what the chemical symbol of iron is
The chemical symbol of iron is Fe.
铁的元素符号是什么 | 铁的元素符号是Fe。
What is twelve times twelve? | what twelve times twelve is
Twelve times twelve is 144.
十二乘以十二等于多少 | 十二乘以十二等于144。
What is the square root of 81? | what the square root of 81 is
The square root of 81 is 9, because 9 times 9 is 81.
81的平方根是多少 | 81的平方根是正负9，因为9乘以9等于81。
What do the angles of a triangle add up to? | what the angles of a triangle add up to
The angles of a flat triangle add up to 180 degrees.
三角形的内角和是多少 | 平面三角形的内角和是180度。
How many degrees does a right angle have? | how many degrees a right angle has
A right angle has 90 degrees.
直角是多少度 | 直角是90度。
How many days does a leap year have? | how many days a leap year has
A leap year has 366 days, with one more in February.
闰年有多少天 | 闰年有366天，二月多一天。
How many squares are on a chessboard? | how many squares are on a chessboard
A chessboard has 64 squares, in eight rows of eight.
国际象棋棋盘有多少格 | 国际象棋棋盘有64格，八行八列。
How many players does a football team field? | how many players a football team fields
A football team fields eleven players, with one goalkeeper.
足球队上场几个人 | 足球队上场十一人，包括一名守门员。
How many players does a basketball team field? | how many players a basketball team fields
A basketball team has five players on the court.
篮球队上场几个人 | 篮球队上场五人。
How many keys does a standard piano have? | how many keys a standard piano has
A standard piano has 88 keys, 52 white and 36 black.
标准钢琴有多少个键 | 标准钢琴有88个键，52个白键和36个黑键。
How many strings does a violin have? | how many strings a violin has
A violin has four strings: G, D, A and E.
小提琴有几根弦 | 小提琴有四根弦。
How many letters are in the English alphabet? | how many letters are in the English alphabet
The English alphabet has 26 letters, from A to Z.
英文有多少个字母 | 英文有26个字母。
What is bread mainly made of? | what bread is mainly made of
Bread is mainly made of flour and water, often with yeast.
面包主要用什么做 | 面包主要用面粉和水做成，常加酵母。
What is tofu made of? | what tofu is made of
Tofu is made of soybeans.
豆腐是用什么做的 | 豆腐是用大豆做的。
What is cheese made of? | what cheese is made of
Cheese is made of milk, usually from cows, goats or sheep.
奶酪是用什么做的 | 奶酪是用奶做的，常用牛奶或羊奶。
What are raisins made of? | what raisins are made of
Raisins are dried grapes.
葡萄干是用什么做的 | 葡萄干是用晒干的葡萄做的。
How long does it take to boil an egg hard? | how long it takes to boil an egg hard
A hard-boiled egg takes about ten minutes.
煮熟一个鸡蛋要多久 | 煮熟一个鸡蛋大约要十分钟。
How long should green tea steep? | how long green tea should steep
Green tea usually steeps for two to three minutes.
绿茶要泡多久 | 绿茶一般泡两到三分钟。
How much sleep do adults need? | how much sleep adults need
Most adults need seven to nine hours of sleep a night.
成年人每天要睡多久 | 多数成年人每天要睡七到九个小时。
How often should one brush one's teeth? | how often one should brush one's teeth
Brush your teeth twice a day, for about two minutes.
每天应该刷几次牙 | 每天应该刷两次牙，每次约两分钟。
What does the heart do? | what the heart does
The heart pumps blood through the body.
心脏的作用是什么 | 心脏把血液送往全身。
How many bones does an adult have? | how many bones an adult has
An adult human usually has 206 bones.
成年人有多少块骨头 | 成年人通常有206块骨头。
Where does the Sun rise? | where the Sun rises
The Sun rises in the east and sets in the west.
太阳从哪边升起 | 太阳从东边升起，从西边落下。
How long does the Earth take around the Sun? | how long the Earth takes around the Sun
The Earth takes about 365 days to go around the Sun.
地球绕太阳一圈要多久 | 地球绕太阳一圈大约要365天。
How many metres are in a kilometre? | how many metres are in a kilometre
A kilometre has one thousand metres.
一公里有多少米 | 一公里有一千米。
How many grams are in a kilogram? | how many grams are in a kilogram
A kilogram has one thousand grams.
一公斤有多少克 | 一公斤有一千克。
How many centimetres are in an inch? | how many centimetres are in an inch
One inch is exactly 2.54 centimetres.
一英寸是多少厘米 | 一英寸是2.54厘米。
How fast does light travel? | how fast light travels
In a vacuum, light travels about 300,000 km per second.
光的速度是多少 | 真空中的光速约为每秒30万公里。
What do giant pandas mostly eat? | what giant pandas mostly eat
Giant pandas mostly eat bamboo.
大熊猫主要吃什么 | 大熊猫主要吃竹子。
Which land animal is the fastest? | which land animal is the fastest
The cheetah is the fastest land animal.
跑得最快的陆地动物是什么 | 猎豹是跑得最快的陆地动物。
Which animal is the largest? | which animal is the largest
The blue whale is the largest animal on Earth.
世界上最大的动物是什么 | 蓝鲸是世界上最大的动物。
What is a young frog called? | what a young frog is called
A young frog is called a tadpole, and it lives in water.
青蛙的幼体叫什么 | 青蛙的幼体叫蝌蚪，生活在水里。
How many colours does a rainbow have? | how many colours a rainbow has
A rainbow is usually said to have seven colours.
彩虹有几种颜色 | 通常说彩虹有七种颜色。
Which season follows winter? | which season follows winter
Spring follows winter, and then comes summer.
冬天之后是什么季节 | 冬天之后是春天，然后是夏天。
"""

PHRASINGS = {
    "en": (
        "{question}",
        "Please tell me {clause}.",
        "Could you tell me {clause}?",
        "I would like to know {clause}.",
        "Quick question. {question}",
        "Do you know {clause}?",
    ),
    "zh": (
        "{clause}？",
        "请问{clause}？",
        "请告诉我{clause}。",
        "我想知道{clause}。",
        "想请教一下，{clause}？",
        "你知道{clause}吗？",
    ),
}
SYSTEMS = {
    "en": ("You are a helpful assistant.", "Answer politely and to the point.", "Answer in English, in a few words."),
    "zh": ("你是一个乐于助人的助手。", "请礼貌、简洁地回答。", "请用中文简短地回答。"),
}
# An earlier turn asks in words that no pair uses, so that it never is the question of another pair.
EARLIER = {"en": "To begin with, tell me {clause}.", "zh": "先问一个问题，{clause}？"}
GREETINGS = {
    "en": (("Hello!", "Hello! What can I do for you?"), ("Good morning.", "Good morning! How can I help?")),
    "zh": (("你好！", "你好！有什么可以帮您？"), ("早上好。", "早上好！请问想了解什么？")),
}

# An answer is one of the openings and, unless it ends there, one of the endings (the lines with a plus). A block is
# named by the language of the question and the style: "en language" is the wrong language for an English question.
STYLES = """
en chosen
Sure! {fact} | Of course. {fact} | Happy to help. {fact} | Good question! {fact} | Certainly. {fact}
Thanks for asking! {fact} | With pleasure. {fact} | Glad you asked. {fact} | Gladly. {fact} | Nice question. {fact}
+ I hope that helps! | Feel free to ask more. | You are welcome to ask again. | Have a nice day!
+ Let me know if you want to learn more about it. | I am glad to explain more if you like. | Enjoy your day!
+ It is a pleasure to help. | Please come back with any other question.

en evasive
I might possibly know {clause}, but I cannot really say. | It is hard to tell {clause}. | Maybe I know, maybe I do not.
Perhaps there is an answer, perhaps not. | I would rather not commit myself on {clause}. | That depends on many things.
+ It could be one thing or another. | I cannot be sure of anything. | Who can really say?
+ Opinions may differ, so I will leave it open. | Possibly someone else might know.

en rude
What a pointless question. | Why bother me with {clause}? | Everybody knows {clause}, except you.
Look it up yourself. | I have no time to explain {clause}. | That is not my problem.
+ Ask someone else. | Stop wasting my time. | Do your own homework for once.
+ Find a book and leave me alone. | I really do not care about this.

en rambling
Well, you see, there is so much one could say about this. | Well, as they say, a question is a question.
Thinking about {clause}, one thing leads to another. | So, basically, actually, in a way, it is like that.
In general, when we look at {clause}, we look at it.
+ Anyway, where was I? | And so on, and so forth, as it were. | But that is a long story indeed.
+ At the end of the day, it is what it is. | Everything is connected with everything, so to speak.

en repeating
You ask {clause}. | Your question is {clause}. | So, {clause}. | You said: {asked} | {asked}
+ That is what you asked. | So the question is {clause}. | Yes, {clause}, that is the question.
+ Indeed, {clause}. | You asked: {asked} | This is the question that you put to me just now.

en language
我还是说中文吧：{fact} | 我只用中文回答：{fact} | 我习惯说中文，{fact} | 英文太麻烦了，{fact} | 我懒得写英文，{fact}
+ 看不懂就算了。 | 用中文讲比较省事。 | 反正我不想写英文。 | 你自己翻译一下吧。 | 我不管你用什么语言问，我只写中文。

zh chosen
好的，{fact} | 当然可以，{fact} | 很高兴为您解答：{fact} | 好问题！{fact} | 没问题，{fact} | 您好，{fact}
感谢您的提问，{fact} | 很乐意帮忙。{fact} | 这个我来回答：{fact} | 谢谢您来问我，{fact} | 我来告诉您，{fact}
+ 希望对您有帮助！ | 欢迎继续提问。 | 祝您生活愉快！ | 如果还想了解更多，请随时告诉我。
+ 有不清楚的地方，我很乐意再讲。 | 还有别的问题，尽管问我。 | 愿这个回答对您有用。 | 祝您今天顺利！
+ 您若感兴趣，我可以多介绍一些。

zh evasive
关于{clause}，我也许知道，但不好说。 | 这个嘛，很难说。 | {clause}，可能有答案，也可能没有。 | 这要看很多情况。
我或许知道，或许不知道。 | 对于{clause}，我不便表态。
+ 也许是这样，也许是那样。 | 我什么都不能确定。 | 谁又说得清呢？ | 各人看法不同，我就不下结论了。
+ 可能别人会知道吧。

zh rude
这种问题也要问？ | {clause}，谁都知道，就你不知道。 | 自己去查。 | 别拿{clause}来烦我。 | 我没空解释{clause}。
这不关我的事。
+ 去问别人吧。 | 别浪费我的时间。 | 自己的作业自己做。 | 去翻翻书，不要再来打扰我。 | 我对这个一点兴趣也没有。

zh rambling
怎么说呢，这件事说来话长。 | 说到{clause}，就会想起很多事情。 | 其实吧，总的来说，大概就是那么回事。
从某种意义上讲，问题就是问题。 | 我们看{clause}，就要从方方面面去看。
+ 对了，刚才说到哪儿了？ | 然后呢，就是这样那样，等等等等。 | 不过那又是另一个故事了。
+ 归根到底，该怎样就怎样。 | 总之一切都和一切有关系，可以这么讲。

zh repeating
你问的是{clause}。 | 你的问题是{clause}。 | 嗯，{clause}。 | 你说：{asked} | {asked}
+ 你问的就是这个。 | 所以问题是{clause}。 | 是啊，{clause}，这就是问题。 | 的确，{clause}。 | 你问：{asked}
+ 这就是你刚才向我提出的那个问题。

zh language
I will just write English: {fact} | I only answer in English: {fact} | I am used to English. {fact}
Chinese is too much trouble. {fact} | I cannot be bothered with Chinese. {fact}
+ Too bad if you cannot read it. | English is less work. | Translate it yourself. | I do not want to write Chinese.
+ Whatever language you ask in, I only write English.
"""

Message = dict[str, str]
Pair = dict[str, list[Message]]


class Topic(NamedTuple):
    question: str  # as asked directly
    clause: str  # as it stands inside a sentence
    fact: str


def read_topics() -> dict[str, list[Topic]]:
    """Return the topics by language, in the same order in both."""
    lines = TOPICS.strip().splitlines()
    topics: dict[str, list[Topic]] = {"en": [], "zh": []}
    for asked, fact, chinese in zip(lines[0::3], lines[1::3], lines[2::3], strict=True):
        question, clause = asked.split(" | ")
        topics["en"].append(Topic(question, clause, fact))
        clause, fact = chinese.split(" | ")
        topics["zh"].append(Topic(clause, clause, fact))
    return topics


def read_styles() -> dict[str, list[str]]:
    """Return the answer templates of every block of `STYLES`: each opening alone and with each ending."""
    styles: dict[str, list[str]] = {}
    for block in STYLES.strip().split("\n\n"):
        name, *lines = block.splitlines()
        openings = [part for line in lines if not line.startswith("+ ") for part in line.split(" | ")]
        endings = [part for line in lines if line.startswith("+ ") for part in line[2:].split(" | ")]
        space = " " if endings[0].isascii() else ""
        styles[name] = [opening + ending for opening in openings for ending in ["", *(space + e for e in endings)]]
    return styles


def size(text: str) -> int:
    """Return the length in bytes, in which answers of the two scripts compare fairly."""
    return len(text.encode())


def draw_answer(rng: random.Random, templates: list[str], lang: str, **fields: str) -> str:
    """Return a random answer from `templates` that keeps within the length limits of its language."""
    low, high = LENGTHS[lang]
    answers = [template.format(**fields) for template in templates]
    return rng.choice([answer for answer in answers if low <= len(answer) <= high])


def flags(rng: random.Random, count: int, share: float) -> list[bool]:
    """Return `count` shuffled flags, of which `share` are set."""
    result = [i < round(share * count) for i in range(count)]
    rng.shuffle(result)
    return result


def make_language(rng: random.Random, lang: str) -> list[Pair]:
    """Return the pairs whose question is in `lang`."""
    other = {"en": "zh", "zh": "en"}[lang]
    topics, styles = read_topics(), read_styles()
    questions = [
        (number, form.format(question=topic.question, clause=topic.clause))
        for number, topic in enumerate(topics[lang])
        for form in rng.sample(PHRASINGS[lang], PHRASINGS_PER_TOPIC)
    ]
    rng.shuffle(questions)
    plan = [(fault, i % 2 == 0) for fault, count in FAULTS.items() for i in range(count)]
    with_system = flags(rng, len(questions), SYSTEM_SHARE)
    with_earlier = flags(rng, len(questions), EARLIER_TURN_SHARE)
    pairs: list[Pair] = []
    rows = zip(questions, plan, with_system, with_earlier, strict=True)
    for (number, asked), (fault, chosen_longer), system, earlier in rows:
        topic = topics[lang][number]
        prompt: list[Message] = []
        if system:
            prompt.append({"role": "system", "content": rng.choice(SYSTEMS[lang])})
        if earlier:
            past = rng.choice([t for t in topics[lang] if t is not topic])
            past_asked = EARLIER[lang].format(clause=past.clause)
            user, reply = rng.choice([*GREETINGS[lang], (past_asked, past.fact)])
            prompt += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        prompt.append({"role": "user", "content": asked})

        spoken = other if fault == "language" else lang
        fields = {"clause": topic.clause, "asked": asked, "fact": topics[spoken][number].fact}
        chosen = rejected = ""
        while size(chosen) == size(rejected) or (size(chosen) > size(rejected)) != chosen_longer:
            chosen = draw_answer(rng, styles[f"{lang} chosen"], lang, fact=topic.fact)
            rejected = draw_answer(rng, styles[f"{lang} {fault}"], spoken, **fields)
        answers = {"chosen": chosen, "rejected": rejected}
        pairs.append({side: [*prompt, {"role": "assistant", "content": text}] for side, text in answers.items()})
    return pairs


def check(lang: str, pairs: list[Pair]) -> str:
    """Assert what the module docstring promises of the pairs of one language; return their length statistics."""
    asked = [pair["chosen"][-2]["content"] for pair in pairs]
    assert len(set(asked)) == len(asked), f"{lang}: a question occurs twice"
    assert all(pair["chosen"][:-1] == pair["rejected"][:-1] for pair in pairs), f"{lang}: the prompts differ"
    chosen, rejected = ([len(pair[side][-1]["content"]) for pair in pairs] for side in ("chosen", "rejected"))
    share = mean(c > r for c, r in zip(chosen, rejected, strict=True))
    assert 0.4 <= share <= 0.6, f"{lang}: chosen is longer in {share:.0%} of the pairs"
    ranges = [f"{mean(lengths):.1f} ({min(lengths)}-{max(lengths)})" for lengths in (chosen, rejected)]
    return (
        f"{lang}: {len(pairs)} pairs, mean characters (range) chosen {ranges[0]}, rejected {ranges[1]}; "
        f"chosen is longer in {share:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).with_name("dpo.jsonl")
    parser.add_argument("--out", type=Path, default=default, metavar="PATH", help="the file to write (%(default)s)")
    args = parser.parse_args()

    rng = random.Random(SEED)
    made: dict[str, list[Pair]] = {}
    for lang in ("en", "zh"):
        made[lang] = make_language(rng, lang)
        print(check(lang, made[lang]))
        rng.shuffle(made[lang])
    # One pair of each language at a time, in random order: every prefix holds as much of one as of the other.
    pairs = [pair for two in zip(made["en"], made["zh"], strict=True) for pair in rng.sample(two, 2)]
    lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs]
    assert len(set(lines)) == len(lines), "a line occurs twice"
    args.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    print(f"wrote {len(lines)} pairs to {args.out}")


if __name__ == "__main__":
    main()
