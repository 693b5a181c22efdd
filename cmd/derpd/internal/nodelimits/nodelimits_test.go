package nodelimits

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/relay"
	"derpd/relay/admit"
)

func TestRate(t *testing.T) {
	for value, want := range map[string]int64{
		"20Mbit": 2_500_000, "20mbit": 2_500_000, "20Mbit/s": 2_500_000, "1.5Mbit": 187_500, "512kbit": 64_000, "1Gbit": 125_000_000,
		"128kbit": 16_000, "128000": 16_000, "128000bit": 16_000, "100Gbit": 12_500_000_000, "unlimited": 0, "off": 0, "OFF": 0,
	} {
		if got, err := Rate(value); got != want || err != nil {
			t.Errorf("%s: %d, %v; want %d", value, got, err, want)
		}
	}
	const want = `want a rate in bits per second such as 20Mbit, 1.5Mbit, 512kbit or 1Gbit, or unlimited, got `
	for value, message := range map[string]string{
		"":         want + `""`,
		"20MB":     want + `"20MB"`,
		"20 MiB/s": want + `"20 MiB/s"`,
		"Mbit":     want + `"Mbit"`,
		"1.2.3":    want + `"1.2.3"`,
		"-1Mbit":   want + `"-1Mbit"`,
		"1e9":      want + `"1e9"`,
		"NaN":      want + `"NaN"`,
		"0":        `want at least 128kbit, or a node seems broken, got "0"; write unlimited for no limit`,
		"127kbit":  `want at least 128kbit, or a node seems broken, got "127kbit"; write unlimited for no limit`,
		"101Gbit":  `want at most 100Gbit, got "101Gbit"; write unlimited for no limit`,
	} {
		if got, err := Rate(value); err == nil || err.Error() != message {
			t.Errorf("%q: %d, %v; want %s", value, got, err, message)
		}
	}
}

func TestBurst(t *testing.T) {
	for value, want := range map[string]int{"256KiB": 256 << 10, "1MiB": 1 << 20, "100kB": 100_000, "65536": 65536, "1.5MiB": 3 << 19, "16KiB": 16 << 10} {
		if got, err := Burst(value, 16_000); got != want || err != nil {
			t.Errorf("%s: %d, %v; want %d", value, got, err, want)
		}
	}
	for value, message := range map[string]string{
		"":       `want a size in bytes such as 256KiB or 1MiB, got ""`,
		"1Mbit":  `want a size in bytes such as 256KiB or 1MiB, got "1Mbit"`,
		"250ms":  `want a size in bytes such as 256KiB or 1MiB, got "250ms"`,
		"16000":  `want at least 16KiB for this rate, got "16000"`,
		"2000MB": `want at most 1024MiB, got "2000MB"`,
	} {
		if _, err := Burst(value, 16_000); err == nil || err.Error() != message {
			t.Errorf("%q: %v; want %s", value, err, message)
		}
	}
	if _, err := Burst("1MiB", 125_000_000); err == nil || err.Error() != `want at least 1221KiB for this rate, got "1MiB"` {
		t.Errorf("1 MiB for 1 Gbit/s: %v", err)
	}
	for rate, want := range map[int64]int{16_000: 64 << 10, 2_500_000: 625_000, 12_500_000_000: 64 << 20} {
		if got := DefaultBurst(rate); got != want {
			t.Errorf("the burst of %d bytes/s is %d, want %d", rate, got, want)
		}
		if rate < 1e9 {
			if _, err := Burst(formatSize(DefaultBurst(rate)), rate); err != nil {
				t.Error(err)
			}
		}
	}
}

var defaults = relay.NodeLimit{Rate: 1_000_000, Burst: 300_000, Connections: 16}

// The first line that fits counts. What it leaves out is that of the defaults, but a
// rate has its own burst.
func TestOf(t *testing.T) {
	alice, bob, carol := key.NewNode().Public(), key.NewNode().Public(), key.NewNode().Public()
	list := map[key.NodePublic]admit.Description{
		alice: {Comment: "Alice's phone", Tags: []string{"tag:guest", "tag:slow"}, Name: "phone.tail1234.ts.net"},
		bob:   {Name: "nas.tail1234.ts.net", Tailnet: "example.com"},
		carol: {Tailnet: "friends.example", Tags: []string{"tag:slow"}},
	}
	for text, want := range map[string]map[key.NodePublic]relay.NodeLimit{
		alice.String() + " rate=2Mbit # alice":  {alice: {Rate: 250_000, Burst: 65536, Connections: 16}, bob: defaults},
		`comment:"Alice's phone" connections=2`: {alice: {Rate: 1_000_000, Burst: 300_000, Connections: 2}, carol: defaults},
		"tag:slow rate=unlimited\n* rate=8Mbit burst=128KiB connections=0": {
			alice: {Connections: 16}, carol: {Connections: 16}, bob: {Rate: 1_000_000, Burst: 128 << 10},
		},
		"tailnet:TAIL1234.ts.net connections=3\ntailnet:example.com connections=4\ntailnet:friends.example connections=5": {
			alice: {Rate: 1_000_000, Burst: 300_000, Connections: 3}, bob: {Rate: 1_000_000, Burst: 300_000, Connections: 3}, carol: {Rate: 1_000_000, Burst: 300_000, Connections: 5},
		},
		"tailnet:example.com burst=64KiB\ntag:guest connections=7\ntag:slow connections=8": {
			alice: {Rate: 1_000_000, Burst: 300_000, Connections: 7}, bob: {Rate: 1_000_000, Burst: 64 << 10, Connections: 16}, carol: {Rate: 1_000_000, Burst: 300_000, Connections: 8},
		},
	} {
		path := filepath.Join(t.TempDir(), "limits")
		write(t, path, text)
		l, err := New(Config{Defaults: defaults, Path: path, Describe: func(node key.NodePublic) admit.Description { return list[node] }, Log: zerolog.Nop()})
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		for node, want := range want {
			if got, _ := l.Of(node); got != want {
				t.Errorf("%q: %+v for %+v, want %+v", text, got, list[node], want)
			}
		}
	}
}

// All problems of a file are reported at once, each with its line and its fix.
func TestParseErrors(t *testing.T) {
	const (
		who      = `line 1: want nodekey:…, comment:"…", tag:…, tailnet:… or * for all others, got `
		tag      = `line 1: want tag: and a name of letters, digits, dashes, dots and underscores that begins with a letter, got `
		settings = `line 1: want rate=, burst= or connections=, each without blanks such as rate=2Mbit, got `
		rate     = `line 1: rate=: want a rate in bits per second such as 20Mbit, 1.5Mbit, 512kbit or 1Gbit, or unlimited, got `
	)
	k, long := key.NewNode().Public().String(), strings.Repeat("a", longestValue+1)
	for text, want := range map[string]string{
		"":                                        "no line has a limit; add one such as: tag:guest rate=2Mbit",
		"# nothing\n\n":                           "no line has a limit; add one such as: tag:guest rate=2Mbit",
		"NodeKey:" + k[len("nodekey:"):]:          "line 1: want a limit after who it is for, such as rate=2Mbit or connections=4, got none",
		k:                                         "line 1: want a limit after who it is for, such as rate=2Mbit or connections=4, got none; a list of keys alone belongs in DERP_ALLOW_KEYS",
		"tag:guest":                               "line 1: want a limit after who it is for, such as rate=2Mbit or connections=4, got none",
		"rate=2Mbit":                              `line 1: want who the limit is for, and then settings, got "rate=2Mbi…"; write * before it for every node`,
		"guest rate=2Mbit":                        who + `"gues…"`,
		"tags:a rate=2Mbit":                       who + `"tags:a"`,
		"tag=guest rate=2Mbit":                    `line 1: want tag: with a colon, got "tag=gues…"`,
		"nodekey:12 rate=2Mbit":                   `line 1: want nodekey: and 64 hex digits, got "nodekey:12"`,
		"tag: guest rate=2Mbit":                   tag + `"tag:"`,
		"tag:a:b rate=2Mbit":                      tag + `"tag:a:b"`,
		"tag:a,b rate=2Mbit":                      tag + `"tag:a,b"`,
		`comment: "a" rate=2Mbit`:                 `line 1: want a name after comment:, got none; write comment:"my name" without a blank before it`,
		`tailnet: rate=2Mbit`:                     `line 1: want a name after tailnet:, got none; write tailnet:"my name" without a blank before it`,
		`comment:my nas rate=2Mbit`:               settings + `"nas"; a comment with blanks needs quotes: comment:"my nas"`,
		`comment:"my nas"rate=2Mbit`:              `line 1: want a blank after the closing quote, got "r"; write one`,
		"comment:nas rate=2Mbit x":                settings + `"x"`,
		"* rate 2Mbit":                            settings + `"rate"`,
		"* rate = 2Mbit":                          settings + `"rate"`,
		"* rate=2 Mbit":                           settings + `"Mbit"`,
		"* rates=2Mbit":                           settings + `"rates=2Mbi…"`,
		"* rate=2Mbit,connections=2":              rate + `"2Mbit,connections=2"`,
		"* rate=" + long:                          `line 1: rate=: want a short value such as rate=2Mbit, got "rate=aaaa…"`,
		"tag：a rate=2Mbit":                        `line 1: has "：" (U+FF1A); write :, or put a comment that has it in quotes`,
		"tag:a rate＝2Mbit":                        `line 1: has "＝" (U+FF1D); write =, or put a comment that has it in quotes`,
		"comment:“a” rate=2Mbit":                  `line 1: has "“" (U+201C); write ", or put a comment that has it in quotes`,
		"＃ note":                                  `line 1: has "＃" (U+FF03); write #, or put a comment that has it in quotes`,
		"tag:a\u3000rate=2Mbit":                   `line 1: has a blank of another kind (U+3000); write an ordinary blank`,
		"tag:a rate=2\u00a0Mbit":                  `line 1: has a blank of another kind (U+00A0); write an ordinary blank`,
		"tag:a\u200b rate=2Mbit":                  `line 1: has an invisible character (U+200B); remove it`,
		"* rate=2Mbit\n\x1a":                      `line 2: has an invisible character (U+001A); remove it`,
		"* rate=2MB":                              `line 1: rate=: want a rate in bits per second such as 20Mbit, 1.5Mbit, 512kbit or 1Gbit, or unlimited, got "2MB"`,
		"* rate=2Mbit rate=3Mbit":                 "line 1: rate= is set twice; remove one of the two",
		"* rate=unlimited burst=64KiB":            "line 1: burst=: is only used with a rate, but there is none; add rate=, or remove burst=",
		"* burst=1":                               `line 1: burst=: want at least 16KiB for this rate, got "1"`,
		"* connections=-1":                        `line 1: connections=: want a number of connections from 1 to 100000, or unlimited, got "-1"`,
		`comment:"a rate=2Mbit`:                   `line 1: a quote is not closed; write comment:"the comment"`,
		"tag:a rate=2Mbit\n\ntag:a connections=1": "line 3: tag:a has a line already (line 1); remove one of the two",
		"tailnet:a.ts.net rate=1Mbit\ntailnet:A.ts.net rate=2Mbit":  "line 2: tailnet:A.ts… has a line already (line 1); remove one of the two",
		k + " rate=2Mbit\n" + k + " rate=2Mbit":                     "line 2: " + k[:len("nodekey:")] + "… has a line already (line 1); remove one of the two",
		"# x\n* rate=2Mbit\ntag:a rate=3Mbit":                       "line 3: tag:a never gets this limit, because * on line 2 comes first; move the line with * to the end",
		"tag:a rate=x\n* connections=y\ntskey-auth-abcdefgh-SECRET": "many",
	} {
		_, err := Parse(text, defaults)
		switch {
		case err == nil:
			t.Errorf("%q: no error", text)
		case want == "many":
			if strings.Count(err.Error(), "line ") < 3 || strings.Contains(err.Error(), "SECRET") {
				t.Errorf("%q: %v", text, err)
			}
		case strings.HasPrefix(want, "line 2: nodekey:"):
			if !strings.HasSuffix(err.Error(), "has a line already (line 1); remove one of the two") {
				t.Errorf("%v", err)
			}
		case err.Error() != want:
			t.Errorf("%q:\n%v\nwant\n%s", text, err, want)
		}
	}
}

// A file that is another than meant, such as a key file, gives a short message.
func TestParseManyErrors(t *testing.T) {
	_, err := Parse(strings.Repeat(key.NewNode().Public().String()+" # laptop\n", 1000), defaults)
	if lines := strings.Split(err.Error(), "\n"); len(lines) != mostErrors+1 || !strings.HasSuffix(lines[mostErrors], "more; correct these first") {
		t.Errorf("%d lines, the last one %q", len(lines), lines[len(lines)-1])
	}
	if _, err := Parse("* "+strings.Repeat("x ", 100_000), defaults); len(err.Error()) > 1000 {
		t.Errorf("a message of %d bytes", len(err.Error()))
	}
}

// Forms that people use for the same limit are read alike.
func TestParseIsLenient(t *testing.T) {
	node := key.NewNode().Public()
	k := node.String()
	want := Rule{Line: 1, Limit: relay.NodeLimit{Rate: 250_000, Burst: 65536, Connections: 3}}
	for text, rule := range map[string]Rule{
		"tag:a_b.c\trate=2Mbit\tconnections=3\r\n":                     {kind: byTag, value: "tag:a_b.c", Who: "tag:a_b.c"},
		"Tag:a RATE=2mbit/s Connections=3":                             {kind: byTag, value: "tag:a", Who: "Tag:a"},
		"NodeKey:" + k[len("nodekey:"):] + " rate=2Mbit connections=3": {kind: byKey, node: node, value: k[len("nodekey:"):], Who: "NodeKey:" + k[len("nodekey:"):]},
		`comment:"小明（手机）" rate="2Mbit" connections=3#x`:                {kind: byComment, value: "小明（手机）", Who: "comment:小明（手机）"},
		`"comment:my nas" rate=2Mbit connections=3 # ，`:                {kind: byComment, value: "my nas", Who: "comment:my nas"},
	} {
		rule.Line, rule.Limit = want.Line, want.Limit
		if got, err := Parse(text, defaults); err != nil || len(got) != 1 || got[0] != rule {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, rule)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A changed file applies. While it is broken, the last good lines stay in force, and
// the problem is reported and logged once.
func TestReload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "limits")
	write(t, path, "* connections=1\n")
	changes := make(chan struct{}, 10)
	log := new(testkit.Buffer)
	l, err := New(Config{
		Path: path, Log: zerolog.New(log), Changed: func() { changes <- struct{}{} },
		Describe: func(key.NodePublic) admit.Description { return admit.Description{} },
	})
	if err != nil {
		t.Fatal(err)
	}
	node := key.NewNode().Public()
	connections := func() int {
		limit, _ := l.Of(node)
		return limit.Connections
	}
	go func() { _ = l.Run(t.Context()) }()
	write(t, path, "\n* connections=2\n")
	testkit.Receive(t, "the change", changes)
	if got := connections(); got != 2 || l.Problem() != nil {
		t.Errorf("%d connections, %v", got, l.Problem())
	}
	if got, want := l.Explain(node), "no limit on what it sends, 2 connections (*, "+path+":2)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	write(t, path, "* connections=x\n")
	testkit.Until(t, "the problem", func() bool { return l.Problem() != nil })
	l.Reload()
	want := "the last good 1 lines stay in force: reading limits from " + path + `: line 1: connections=: want a number of connections from 1 to 100000, or unlimited, got "x"`
	if got := connections(); got != 2 || l.Problem().Error() != want || l.Failures() < 2 {
		t.Errorf("%d connections, %d failures, %v", got, l.Failures(), l.Problem())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if l.Reload(); connections() != 2 {
		t.Errorf("%d connections after the file is gone", connections())
	}
	if got := strings.Count(log.String(), "limits not read"); got != 2 {
		t.Errorf("%d errors are logged, want one for each:\n%s", got, log)
	}
	write(t, path, "tag:x connections=3\n")
	if l.Reload(); connections() != 0 || l.Problem() != nil {
		t.Errorf("%d connections, %v", connections(), l.Problem())
	}
	if got, want := l.Explain(node), "no limit on what it sends, any number of connections (DERP_CLIENT_RATE, DERP_MAX_PER_NODE)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// Two readings that agree take less than the second that is promised.
func TestWatchIsFast(t *testing.T) {
	if 2*watchEvery >= time.Second {
		t.Errorf("two readings take %s", 2*watchEvery)
	}
}

// The example is a file that works.
func TestExample(t *testing.T) {
	rules, err := Load("../../../../docker/limits.example", defaults)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, r := range rules {
		list = append(list, r.Who+": "+Describe(r.Limit))
	}
	if want := []string{
		"comment:my nas: no limit on what it sends, 16 connections",
		"tag:guest: sends at most 2 Mbit/s, 128KiB at once, 2 connections",
		"tailnet:friends.ts.net: sends at most 10 Mbit/s, 306KiB at once, 16 connections",
		"*: sends at most 50 Mbit/s, 1526KiB at once, 16 connections",
	}; !slices.Equal(list, want) {
		t.Errorf("%q", list)
	}
}

// A file of any content is parsed without a panic. Every rule of a good file has a limit
// in the allowed range, and errors have no line of another file.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"", "* rate=2Mbit", "tag:a burst=1MiB connections=1 # x", `comment:"a b" rate=unlimited`, "nodekey:", "\"\"\"", "* rate=1.Gbit\r\n", "*\x00rate=1",
		"comment:\" \" rate=99999999999999999999999999", "tailnet:x connections=999999999999999999999", "tag:a rate=.bit",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		rules, err := Parse(text, relay.NodeLimit{})
		if err != nil {
			return
		}
		for _, r := range rules {
			l := r.Limit
			if l.Rate != 0 && (l.Rate < leastRate || l.Rate > mostRate) || l.Connections < 0 || l.Connections > mostConnections ||
				(l.Rate == 0) != (l.Burst == 0) || l.Burst != 0 && l.Burst < leastBurst || l.Burst > mostBurst || r.kind == "" || r.Line == 0 {
				t.Errorf("%q: %+v", text, r)
			}
			_, _ = r.fits(key.NodePublic{}, admit.Description{}), Describe(l)
		}
	})
}
