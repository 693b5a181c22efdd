//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestVerdict(t *testing.T) {
	const reason = notRun("no cgroup")
	good, bad := promise("a", true, "1"), promise("b", false, "2")
	weak := strength("attack", 49, 100, "")
	for want, outcomes := range map[state][]outcome{
		kept:       {outcomeOf([]measured{good, note("c", "3")}, nil)},
		broken:     {outcomeOf([]measured{good, bad}, nil), outcomeOf([]measured{weak, bad}, nil), outcomeOf([]measured{good}, errors.New("it ended"))},
		notReached: {outcomeOf([]measured{weak, good}, nil)},
		didNotRun:  {outcomeOf(nil, reason), outcomeOf(nil, fmt.Errorf("starting: %w", reason))},
	} {
		for _, o := range outcomes {
			// derper's outcome does not matter.
			if got := (result{derpd: o, derper: outcome{Error: "it ended"}}).verdict(); got != want {
				t.Errorf("%+v: %q, want %q", o, got, want)
			}
		}
	}
}

func TestStrength(t *testing.T) {
	for got, want := range map[float64]state{0: notReached, 49: notReached, 50: noted, 200: noted} {
		if s := strength("hellos", got, 100, "").State; s != want {
			t.Errorf("%v of 100: %q, want %q", got, s, want)
		}
	}
}

// The printed row has derper's value beside each promise that derper has too, and the
// end says how many promises are broken.
func TestReport(t *testing.T) {
	rows := []result{
		{
			row: row{name: "hellos", attack: "3,000 a second"}, took: 12 * time.Second,
			derpd:  outcome{Lines: []measured{promise("STUN is open", true, "0 of 20"), promise("ready", false, "3 of 20"), note("open", "7")}},
			derper: outcome{Lines: []measured{promise("STUN is open", false, "9 of 20")}},
		},
		{row: row{name: "silent-64", attack: "9,000"}, derpd: outcome{NotRun: "no cgroup"}, derper: outcome{Error: "derper was killed"}},
		{row: row{name: "slow"}, derpd: outcome{Lines: []measured{promise("gone", true, "2 s"), strength("MB", 1, 100, "")}}},
		{row: row{name: "waves"}, derpd: outcome{Lines: []measured{promise("gone", true, "2 s")}}},
	}
	var out bytes.Buffer
	for _, r := range rows {
		if err := r.write(&out); err != nil {
			t.Fatal(err)
		}
	}
	err := conclude(&out, rows)
	if err == nil || !strings.Contains(err.Error(), `["hellos"]`) {
		t.Errorf("error %v, want one that names hellos alone", err)
	}
	const want = `
hellos: 3,000 a second
  promise       derpd    derper   
  STUN is open  0 of 20  9 of 20  ok
  ready         3 of 20  -        FAILED
  open          7        -        
  FAILED, 12 s

silent-64: 9,000
  no cgroup
  derper: derper was killed
  NOT RUN, 0 s

slow: 
  promise  derpd     derper  
  gone     2 s       -       ok
  MB       1 of 100  -       NOT REACHED
  NOT REACHED, 0 s

waves: 
  promise  derpd  derper  
  gone     2 s    -       ok
  ok, 0 s

| attack | promise | derpd | derper | |
|---|---|---|---|---|
| hellos: 3,000 a second | STUN is open | 0 of 20 | 9 of 20 | ok |
|  | ready | 3 of 20 | - | FAILED |
|  | open | 7 | - |  |
| silent-64: 9,000 | - | no cgroup | derper was killed | NOT RUN |
| slow:  | gone | 2 s | - | ok |
|  | MB | 1 of 100 | - | NOT REACHED |
| waves:  | gone | 2 s | - | ok |

4 attacks: 1 ok, 1 FAILED, 1 NOT REACHED, 1 NOT RUN
`
	if got := out.String(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if err := conclude(&out, rows[1:]); err != nil {
		t.Errorf("no promise is broken: %v", err)
	}
}

func TestDelay(t *testing.T) {
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	for _, c := range []struct {
		quiet, noise, under time.Duration
		lost                int64
		want                state
	}{
		{ms(10), ms(1), ms(49), 0, kept},
		{ms(10), ms(1), ms(50), 0, broken},
		{ms(10), ms(20), ms(99), 0, kept}, // the machine alone delays by 20 ms
		{ms(10), ms(20), ms(100), 0, broken},
		{ms(1), ms(1), ms(9), 0, kept}, // nobody feels it
		{ms(1), ms(1), ms(10), 0, broken},
		{ms(10), ms(1), 0, 100, broken},         // no packet arrived
		{ms(21), ms(1), ms(200), 0, notReached}, // the machine was busy before
		{ms(20), ms(1), ms(200), 0, broken},
		{ms(21), ms(1), 0, 100, broken},
	} {
		s := siege{quiet: traffic{P99: c.quiet}, under: traffic{P99: c.under, Noise: c.noise, Sent: 100, Lost: c.lost}}
		if got := s.delay(); got.State != c.want {
			t.Errorf("%+v: %+v", c, got)
		}
	}
}

func TestSoon(t *testing.T) {
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	for _, c := range []struct {
		longest, machine time.Duration
		want             state
	}{
		{ms(1999), ms(0), kept},
		{ms(1999), ms(900), kept},
		{ms(2000), ms(0), broken},
		{ms(2499), ms(100), notReached}, // the machine alone delays by 100 ms
		{ms(2500), ms(100), broken},
		{newMemberEver, ms(500), broken}, // a member that never gets in
	} {
		if got := soon("admitted", newMemberSoon, c.longest, c.machine, "slowest"); got.State != c.want {
			t.Errorf("%+v: %+v", c, got)
		}
	}
}

func TestTimely(t *testing.T) {
	for _, c := range []struct {
		stall   time.Duration
		isKept  bool
		verdict state
	}{
		{0, false, broken},
		{stallFor - 1, false, broken},
		{stallFor, false, notReached},
		{stallFor, true, kept},
	} {
		l := &lab{own: &machine{longest: c.stall}}
		if got := l.timely(promise("no loss", c.isKept, "1 lost")); got.State != c.verdict {
			t.Errorf("%+v: %+v", c, got)
		}
	}
}

func TestJudgeRate(t *testing.T) {
	const over = 10 * time.Second
	for _, c := range []struct {
		rate, wanted, before float64
		machine              time.Duration
		want                 state
	}{
		{21, 20, 20, 0, kept},
		{19, 20, 20, 0, kept},
		{21.1, 20, 20, 0, broken},
		{18.9, 20, 20, 0, broken},
		{18.9, 20, 20, 20 * time.Millisecond, notReached},
		{18.7, 20, 20, 20 * time.Millisecond, broken},
		{6.2, 5, 20, 100 * time.Millisecond, notReached}, // the change was half a second late
		{6.3, 5, 20, 100 * time.Millisecond, broken},
		{40, 20, 20, 100 * time.Millisecond, broken},
	} {
		if got := judgeRate("rate", c.rate, c.wanted, c.before, over, c.machine, 0); got.State != c.want {
			t.Errorf("%+v: %+v", c, got)
		}
	}
}

func TestWatchedPromises(t *testing.T) {
	good := watched{STUN: 20, Ready: 19, Livez: 999 * time.Millisecond}
	for _, c := range []struct {
		change func(*watched)
		broken []string
	}{
		{func(*watched) {}, nil},
		{func(w *watched) { w.NoSTUN = 1 }, []string{"STUN is open"}},
		{func(w *watched) { w.NotReady, w.Cause = 1, "derp: refused\nmore" }, []string{"ready"}},
		{func(w *watched) { w.Livez = time.Second }, []string{"/livez answers within 1s"}},
		{func(w *watched) { w.Livez, w.Machine = time.Second, time.Millisecond }, nil}, // the machine was busy
		{func(w *watched) { *w = watched{} }, []string{"STUN is open", "ready"}},       // nobody looked
	} {
		w := good
		c.change(&w)
		var got []string
		for _, line := range w.promises(&lab{job: job{Server: "derpd"}}) {
			if line.State == broken {
				got = append(got, line.What)
			}
			if strings.Contains(line.Value, "\n") {
				t.Errorf("a line breaks: %q", line.Value)
			}
		}
		if !slices.Equal(got, c.broken) {
			t.Errorf("%+v: broken %q, want %q", w, got, c.broken)
		}
	}
	if lines := good.promises(&lab{job: job{Server: "derper"}}); len(lines) != 1 {
		t.Errorf("derper has %+v, want STUN alone", lines)
	}
}

func TestHalfOpenJudge(t *testing.T) {
	h := halfOpen{"TCP silent", silentTCP, 5 * time.Second, false}
	for _, c := range []struct {
		counts map[string]int64
		want   state
	}{
		{map[string]int64{"opened": 10, "closed": 10, "longestMillis": 6999}, kept},
		{map[string]int64{"opened": 10, "closed": 10, "longestMillis": 7000}, broken},
		{map[string]int64{"opened": 10, "closed": 9, "longestMillis": 10}, broken},
		{map[string]int64{"opened": 3, "closed": 3}, kept}, // the others were refused
		{nil, broken},
	} {
		if got := h.judge(tally{counts: c.counts}, time.Minute); got.State != c.want {
			t.Errorf("%v: %+v, want %s", c.counts, got, c.want)
		}
	}
}

// Members, new members and attackers have different addresses, in 127.0.0.0/8.
func TestAddresses(t *testing.T) {
	seen := map[netip.Addr]string{}
	loopback := netip.MustParsePrefix("127.0.0.0/8")
	note := func(who string, a netip.Addr) {
		if seen[a] != "" || !loopback.Contains(a) {
			t.Fatalf("%s has %s, as %s has", who, a, seen[a])
		}
		seen[a] = who
	}
	for i := range 1000 {
		note("member", memberAddr(i))
	}
	for i := range 200_000 {
		note("attacker", attackerAddr(i))
	}
	l := load{Addresses: 3, FirstAddr: 7}
	for i, want := range []int{7, 8, 9, 7} {
		if got := l.from(i); got != attackerAddr(want) {
			t.Errorf("connection %d comes from %s, want %s", i, got, attackerAddr(want))
		}
	}
}

// The hello is a whole record of the size that clients send.
func TestClientHello(t *testing.T) {
	hello, err := clientHello()
	if err != nil {
		t.Fatal(err)
	}
	const header, handshake = 5, 0x16
	if len(hello) < 1400 || hello[0] != handshake || len(hello) != header+(int(hello[3])<<8|int(hello[4])) {
		t.Errorf("%d bytes: % x…", len(hello), hello[:min(len(hello), header)])
	}
}

func TestCountEstablished(t *testing.T) {
	// On a machine with another byte order, the kernel prints others.
	if at, err := parseHexAddr("0100007F:1F90"); err != nil || at != netip.MustParseAddrPort("127.0.0.1:8080") {
		t.Skipf("this machine's byte order is another: %s, %v", at, err)
	}
	const text = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0100007F:1F90 0100017F:C350 01 00000000:00000000 00:00000000 00000000     0        0 2
   2: 0100007F:1F90 0200017F:C350 01 00000000:00000000 00:00000000 00000000     0        0 3
   3: 0100007F:1F90 0300017F:C350 04 00000000:00000000 00:00000000 00000000     0        0 4
   4: 0100007F:1F91 0100017F:C350 01 00000000:00000000 00:00000000 00000000     0        0 5
   5: 0100017F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 6
`
	remotes := map[netip.Addr]bool{netip.MustParseAddr("127.1.0.1"): true, netip.MustParseAddr("127.1.0.3"): true}
	if got := countEstablished(text, netip.MustParseAddrPort("127.0.0.1:8080"), remotes); got != 1 {
		t.Errorf("%d established connections, want 1", got)
	}
}

func TestRootCause(t *testing.T) {
	reset := &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	if got, want := rootCause(fmt.Errorf("handshake: %w", reset)), "connection reset by peer"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := rootCause(errors.New(strings.Repeat("a", 50))); len(got) > 50 || strings.Contains(got, strings.Repeat("a", 41)) {
		t.Errorf("%q is not cut", got)
	}
}

func TestMostPerSecond(t *testing.T) {
	begun := time.Now()
	var list []question
	for _, ms := range []int{0, 500, 999, 1000, 1400, 3000} {
		list = append(list, question{at: begun.Add(time.Duration(ms) * time.Millisecond)})
	}
	if got := mostPerSecond(list); got != 4 { // 500 to 1400
		t.Errorf("%d a second, want 4", got)
	}
	if got := mostPerSecond([]question{{at: begun}, {at: begun.Add(time.Second)}}); got != 1 {
		t.Errorf("%d a second of two a second apart, want 1", got)
	}
	if got := mostPerSecond(nil); got != 0 {
		t.Errorf("%d a second without questions", got)
	}
}

func TestSelection(t *testing.T) {
	names := func(rows []row) (list []string) {
		for _, r := range rows {
			list = append(list, r.name)
		}
		return list
	}
	all := names(registered)
	if sorted := slices.Sorted(slices.Values(all)); len(slices.Compact(sorted)) != len(all) {
		t.Errorf("two rows have the same name: %q", all)
	}
	if got := names(selection(options{})); !slices.Equal(got, all) {
		t.Errorf("without options: %q, want all", got)
	}
	short := names(selection(options{short: true}))
	if !slices.Contains(short, "hellos") || slices.Contains(short, "silent-128") {
		t.Errorf("short: %q", short)
	}
}

func TestCommandLine(t *testing.T) {
	for args, want := range map[string]string{
		"":                          "--derpd is not set",
		"--derpd a b":               `unexpected argument "b"`,
		"--derpd a --only (":        "missing closing )",
		"--derpd a --only no-such-": "no attack matches (got no-such-)",
		"--unknown":                 "not defined: -unknown",
	} {
		var out, progress bytes.Buffer
		err := run(t.Context(), strings.Fields(args), &out, &progress)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
		if code := exitCode(err, &progress); code != exitUsage {
			t.Errorf("%q: exit code %d, want %d", args, code, exitUsage)
		}
	}
	var out, progress bytes.Buffer
	if err := run(t.Context(), []string{"--list"}, &out, &progress); err != nil || !strings.Contains(out.String(), "hellos") {
		t.Errorf("--list: %v\n%s", err, out.String())
	}
	if code := exitCode(errors.New("promises are broken"), &progress); code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
}
