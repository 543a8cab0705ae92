"""Real prose in both languages, for filters to pass or, once spoiled, to catch."""

# Inaugural address of George Washington, 1789 (public domain).
ENGLISH = """Fellow-Citizens of the Senate and of the House of Representatives:

Among the vicissitudes incident to life no event could have filled me with greater anxieties than that of which the
notification was transmitted by your order, and received on the 14th day of the present month. On the one hand, I was
summoned by my Country, whose voice I can never hear but with veneration and love, from a retreat which I had chosen
with the fondest predilection, and, in my flattering hopes, with an immutable decision, as the asylum of my declining
years. On the other hand, the magnitude and difficulty of the trust to which the voice of my country called me, being
sufficient to awaken in the wisest and most experienced of her citizens a distrustful scrutiny into his qualifications,
could not but overwhelm with despondence one who ought to be peculiarly conscious of his own deficiencies."""

# Lu Xun, "Kong Yiji", 1919 (public domain).
CHINESE = """鲁镇的酒店的格局，是和别处不同的：都是当街一个曲尺形的大柜台，柜里面预备着热水，可以随时温酒。
做工的人，傍午傍晚散了工，每每花四文铜钱，买一碗酒，这是二十多年前的事，现在每碗要涨到十文，靠柜外站着，热热的喝了休息；
倘肯多花一文，便可以买一碟盐煮笋，或者茴香豆，做下酒物了，如果出到十几文，那就能买一样荤菜，但这些顾客，多是短衣帮，
大抵没有这样阔绰。只有穿长衫的，才踱进店面隔壁的房子里，要酒要菜，慢慢地坐喝。"""

# The Strategies of the Warring States: classical prose, without a modern function word.
CLASSICAL = """秦興師臨周而求九鼎，周君患之，以告顏率。顏率曰：大王勿憂，臣請東借救於齊。顏率至齊，謂齊王曰：
夫秦之為無道也，欲興兵臨周而求九鼎，周之君臣，內自畫計，與秦，不若歸之大國。夫存危國，美名也；得九鼎，厚寶也。願大王圖之。"""
