//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
	"tailscale.com/util/backoff"

	"derpd/internal/testkit"
)

const (
	updates       = 5   // of each relay
	noLonger      = 1.3 // longest outage, as a multiple of upstream's
	sendEvery     = 10 * time.Millisecond
	updateTimeout = 3 * time.Minute
	// The start period, three checks ten seconds apart, and a reserve for slow
	// machines.
	unhealthyWithin = 90 * time.Second
)

// update updates a running relay as Watchtower does, and measures the outage of
// connected clients. It updates upstream's derper in turns and compares the outages,
// because they depend on the machine. The Docker engine and the clients' wait before
// they reconnect take most of the time.
func update(t *testing.T, r *row) {
	h := startHub(t)
	derpd, derper := startDerpd(t, h), startDerper(t, h)
	for range updates {
		derpd.update(t)
		derper.update(t)
	}
	ours, upstreams := median(derpd.outages), median(derper.outages)
	r.saw("no packet for %v, derper %v, medians of %d", ours.Round(time.Millisecond), upstreams.Round(time.Millisecond), updates)
	t.Logf("no packet for %v (derpd) and %v (derper)", derpd.outages, derper.outages)
	if ours.Seconds() > noLonger*upstreams.Seconds() {
		t.Errorf("an update of derpd interrupts clients for %v, one of derper for %v", ours, upstreams)
	}
}

// updateOnce is the short form of update: one update of derpd alone.
func updateOnce(t *testing.T, r *row) {
	derpd := startDerpd(t, startHub(t))
	derpd.update(t)
	r.saw("no packet for %v", derpd.outages[0].Round(time.Millisecond))
}

// badUpdate checks the README's section about a bad update: the update is visible, and
// naming the last good release reverts it.
func badUpdate(t *testing.T, r *row) {
	h := startHub(t)
	good := docker(t, "image", "inspect", "--format", "{{.Id}}", image())
	repository := project(t)
	worked := h.push(t, good, repository+":worked")
	followed := h.Host + "/" + repository + ":followed"
	h.move(t, followed, worked)
	for _, tag := range []string{followed, worked} {
		t.Cleanup(func() { _, _ = run(context.Background(), dockerTimeout, "rmi", tag) })
	}
	relay := writeFile(t, "image.yaml", "")
	name := func(tag string) {
		if err := os.WriteFile(relay, []byte("services:\n  relay:\n    image: "+tag+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	name(followed)
	ports := writeFile(t, ".env", fmt.Sprintf("DERP_PUBLIC_PORT=%d\nDERP_PUBLIC_HTTP_PORT=%d\nDERP_PUBLIC_STUN_PORT=%d\n", testkit.FreePort(t), testkit.FreePort(t), testkit.FreePort(t)))
	d := up(t, "-f", "compose.yaml", "-f", relay, "--env-file", ports)
	// The map pins the present certificate.
	region := reached(onlyRegion(t, d.derpMap(t)), netip.MustParseAddr("127.0.0.1"))
	relayKey := exchange(t, region)

	update := func(t *testing.T, instructions string) {
		t.Helper()
		name(followed)
		h.move(t, followed, worked)
		d.must(t, "pull", "--quiet", "relay")
		d.must(t, "up", "-d", "--wait", "--no-build")
		h.move(t, followed, h.push(t, derived(t, followed, instructions), repository+":bad"))
		if updated, err := watchtower(t, d.id(t)); !updated || err != nil {
			t.Fatalf("updated %t, error %v", updated, err)
		}
	}
	goBack := func(t *testing.T) {
		t.Helper()
		// The engine has to pull the release again.
		_, _ = run(t.Context(), dockerTimeout, "rmi", worked)
		name(worked)
		d.must(t, "up", "-d", "--wait", "--no-build")
		if runs := d.inspect(t, "{{.Image}}"); runs != good {
			t.Errorf("runs %s, want the old image %s", runs, good)
		}
		if again := exchange(t, region); again != relayKey {
			t.Errorf("node key was %v, is %v", relayKey, again)
		}
	}

	t.Run("that exits", func(t *testing.T) {
		update(t, "ENV DERP_ADDR=nonsense")
		await(t, "repeated restarts by the engine", updateTimeout, func() bool {
			return d.inspect(t, "{{gt .RestartCount 1}} {{.State.ExitCode}}") == "true 2"
		})
		if log := d.must(t, "logs", "--no-log-prefix", "--no-color", "relay"); !strings.Contains(log, "DERP_ADDR") {
			t.Errorf("the log does not name DERP_ADDR:\n%s", log)
		}
		goBack(t)
	})
	t.Run("that does not serve", func(t *testing.T) {
		update(t, "ENV DERP_DOMAIN=derp.example.com DERP_ACME_CA=https://127.0.0.1:1/directory")
		begun := time.Now()
		await(t, "the container to be unhealthy", unhealthyWithin, func() bool {
			return d.inspect(t, "{{.State.Health.Status}}") == "unhealthy"
		})
		r.saw("unhealthy after %v, and back by naming the release", time.Since(begun).Round(time.Second))
		if why := d.inspect(t, "{{json .State.Health.Log}}"); !strings.Contains(why, "not ready") {
			t.Errorf("the health check does not say \"not ready\": %s", why)
		}
		goBack(t)
	})
}

// TestProfiles checks the configuration that docker compose makes of the profiles
// autoupdate and notify.
func TestProfiles(t *testing.T) {
	const socket = "/var/run/docker.sock"
	plain := services(t)
	if got := slices.Sorted(maps.Keys(plain)); !slices.Equal(got, []string{"relay"}) {
		t.Errorf("services without a profile: %v", got)
	}
	for profile, name := range map[string]string{"autoupdate": "watchtower", "notify": "diun"} {
		t.Run(profile, func(t *testing.T) {
			all := services(t, "--profile", profile)
			if got := slices.Sorted(maps.Keys(all)); !slices.Equal(got, slices.Sorted(slices.Values([]string{"relay", name}))) {
				t.Fatalf("services are %v", got)
			}
			if !reflect.DeepEqual(all["relay"], plain["relay"]) {
				t.Errorf("the relay differs with the profile: %+v, without it %+v", all["relay"], plain["relay"])
			}
			s := all[name]
			if _, tag, _ := strings.Cut(s.Image, ":"); strings.Count(tag, ".") != 2 {
				t.Errorf("the tag of image %s is not of one release", s.Image)
			}
			if s.Privileged || len(s.CapAdd) > 0 || !slices.Equal(s.CapDrop, []string{"ALL"}) || !s.ReadOnly || len(s.Ports) > 0 ||
				!slices.Equal(s.SecurityOpt, []string{"no-new-privileges:true"}) {
				t.Errorf("not confined: %+v", s)
			}
			if !slices.ContainsFunc(s.Volumes, func(v volume) bool { return v.Target == socket }) {
				t.Errorf("without the engine's socket: %+v", s.Volumes)
			}
			if s.Labels["com.centurylinklabs.watchtower.enable"] != "" {
				t.Errorf("%s would update itself", name)
			}
		})
	}

	relay := plain["relay"]
	if slices.ContainsFunc(relay.Volumes, func(v volume) bool { return strings.Contains(v.Source+v.Target, "docker.sock") }) {
		t.Errorf("the relay has the engine's socket: %+v", relay.Volumes)
	}
	if relay.Privileged || len(relay.CapAdd) > 0 || !slices.Equal(relay.CapDrop, []string{"ALL"}) {
		t.Errorf("the relay has privileges: %+v", relay)
	}
	watchtower := services(t, "--profile", "autoupdate")["watchtower"]
	const scope = "com.centurylinklabs.watchtower.scope"
	if relay.Labels["com.centurylinklabs.watchtower.enable"] != "true" || relay.Labels[scope] != "derpd-profiles" || watchtower.Labels[scope] != "derpd-profiles" {
		t.Errorf("labels of the relay are %v, of watchtower %v", relay.Labels, watchtower.Labels)
	}
	settings := watchtower.Environment
	for name, want := range map[string]string{
		"WATCHTOWER_LABEL_ENABLE": "true", "WATCHTOWER_SCOPE": "derpd-profiles", "WATCHTOWER_CLEANUP": "true",
		"WATCHTOWER_ROLLING_RESTART": "false", "WATCHTOWER_SCHEDULE": "@every 24h", "WATCHTOWER_TIMEOUT": relay.StopGracePeriod,
	} {
		if got := settings[name]; got == nil || *got != want {
			t.Errorf("%s is %v, want %s", name, got, want)
		}
	}
}

// The image has its real creation time, also in a reproducible build, because
// updaters use that time.
func TestImageIsDated(t *testing.T) {
	text := docker(t, "image", "inspect", "--format", "{{.Created}}", image())
	created, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		t.Fatal(err)
	}
	if age := time.Since(created); age < -time.Hour || age > 365*24*time.Hour {
		t.Errorf("the image was created at %s, want within a year", text)
	}
}

type volume struct{ Source, Target string }

// service holds the keys of a compose service that tests check.
type service struct {
	Image           string
	Privileged      bool
	CapAdd          []string `json:"cap_add"`
	CapDrop         []string `json:"cap_drop"`
	SecurityOpt     []string `json:"security_opt"`
	ReadOnly        bool     `json:"read_only"`
	StopGracePeriod string   `json:"stop_grace_period"`
	Ports           []any
	Labels          map[string]string
	Environment     map[string]*string
	Volumes         []volume
}

func services(t *testing.T, flags ...string) map[string]service {
	t.Helper()
	args := slices.Concat([]string{"compose", "-p", "derpd-profiles", "-f", "compose.yaml"}, flags, []string{"config", "--format", "json"})
	var config struct{ Services map[string]service }
	if err := json.Unmarshal([]byte(docker(t, args...)), &config); err != nil {
		t.Fatal(err)
	}
	return config.Services
}

// image returns the name of the image to test.
func image() string {
	if name := os.Getenv("DERPD_IMAGE"); name != "" {
		return name
	}
	return "derpd"
}

// derived builds an image from another one and returns its ID. The other image is
// named by a tag, because BuildKit does not accept an ID.
func derived(t *testing.T, from, instructions string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM "+from+"\n"+instructions+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return built(t, dir)
}

func built(t *testing.T, dir string) string {
	t.Helper()
	id := docker(t, "build", "--quiet", dir)
	t.Cleanup(func() { _, _ = run(context.Background(), dockerTimeout, "rmi", id) })
	return id
}

// updated is a relay that is updated repeatedly, from one image to another and back.
// The images differ only by their IDs.
type updated struct {
	hub
	name    string    // name of the container
	tag     string    // in the registry, given to one image and the other
	images  [2]string // IDs
	pushed  [2]string // names in the registry, which keep their images
	region  *tailcfg.DERPRegion
	outages []time.Duration
}

// begin starts the container, which the test removes at its end.
func (u *updated) begin(t *testing.T, flags []string, command ...string) {
	t.Helper()
	local := u.name + ":local"
	docker(t, "tag", u.images[0], local)
	u.images[1] = derived(t, local, "LABEL update=true")
	u.tag = u.Host + "/" + u.name + ":followed"
	for i, id := range u.images {
		u.pushed[i] = u.push(t, id, fmt.Sprintf("%s:%d", u.name, i))
	}
	docker(t, "rmi", local)
	u.move(t, u.tag, u.pushed[0])
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := run(context.Background(), dockerTimeout, "logs", u.name)
			t.Logf("log of %s:\n%s", u.name, out)
		}
		_, _ = run(context.Background(), dockerTimeout, "rm", "--force", "--volumes", u.name)
		_, _ = run(context.Background(), dockerTimeout, "rmi", u.tag)
	})
	docker(t, slices.Concat([]string{
		"run", "--detach", "--name", u.name, "--label", ownerLabel + "=" + project(t), "--label", "com.centurylinklabs.watchtower.enable=true", "--user", "65532:65532", "--restart", "unless-stopped",
		"--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--stop-timeout", "5",
	}, flags, []string{u.tag}, command)...)
}

// startDerpd starts derpd with a volume and without a domain.
func startDerpd(t *testing.T, h hub) *updated {
	t.Helper()
	u := &updated{hub: h, name: project(t) + "-derpd"}
	u.images[0] = docker(t, "image", "inspect", "--format", "{{.Id}}", image())
	port := testkit.FreePort(t)
	docker(t, "volume", "create", "--label", ownerLabel+"="+project(t), u.name)
	t.Cleanup(func() { _, _ = run(context.Background(), dockerTimeout, "volume", "rm", u.name) })
	u.begin(t, []string{
		"--publish", fmt.Sprintf("127.0.0.1:%d:443", port), "--volume", u.name + ":/data",
		"--env", "DERP_PUBLIC_IPV4=127.0.0.1", "--env", "DERP_PUBLIC_IPV6=none", "--env", fmt.Sprintf("DERP_PUBLIC_PORT=%d", port),
	})
	await(t, "derpd is ready", updateTimeout, func() bool {
		_, err := run(t.Context(), dockerTimeout, "exec", u.name, "/derpd", "healthcheck")
		return err == nil
	})
	m := new(tailcfg.DERPMap)
	if err := json.Unmarshal([]byte(docker(t, "exec", u.name, "/derpd", "derpmap", "--format", "json")), m); err != nil {
		t.Fatal(err)
	}
	u.region = onlyRegion(t, m)
	return u
}

// startDerper is startDerpd for upstream's relay, without a domain: the map pins a
// self-signed certificate.
func startDerper(t *testing.T, h hub) *updated {
	t.Helper()
	path := os.Getenv("DERPD_DERPER")
	if path == "" {
		t.Fatal("DERPD_DERPER: not set to upstream's derper; run make e2e")
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, content := range map[string]string{"derper": string(program), "Dockerfile": "FROM scratch\nCOPY derper /derper\nENTRYPOINT [\"/derper\"]\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	u := &updated{hub: h, name: project(t) + "-derper"}
	u.images[0] = built(t, dir)

	data := t.TempDir() // readable by the container's user
	nodeKey, err := json.Marshal(map[string]any{"PrivateKey": key.NewNode()})
	if err != nil {
		t.Fatal(err)
	}
	certificate := testkit.SelfSigned(t, "127.0.0.1")
	for name, content := range map[string][]byte{"derper.key": nodeKey, "127.0.0.1.crt": testkit.ChainPEM(certificate), "127.0.0.1.key": testkit.KeyPEM(t, certificate)} {
		if err := os.WriteFile(filepath.Join(data, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	port := testkit.FreePort(t)
	u.begin(t, []string{"--publish", fmt.Sprintf("127.0.0.1:%d:443", port), "--volume", data + ":/data:ro"},
		"-c", "/data/derper.key", "-certmode", "manual", "-certdir", "/data", "-hostname", "127.0.0.1")
	u.region = &tailcfg.DERPRegion{RegionID: 901, RegionCode: "derper", Nodes: []*tailcfg.DERPNode{{
		Name: "901a", RegionID: 901, HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none", DERPPort: port, CertName: "sha256-raw:" + testkit.Hash(certificate.Leaf),
	}}}
	return u
}

// update gives the tag to the other image, has the container updated, and notes the
// longest time for which one client heard nothing of the other.
func (u *updated) update(t *testing.T) {
	t.Helper()
	if updated, err := watchtower(t, u.name); updated || err != nil {
		t.Fatalf("%s: updated %t without a new image, error %v", u.name, updated, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), updateTimeout)
	defer cancel()
	var running sync.WaitGroup
	defer running.Wait()
	from, to := testkit.RegionClient(t, u.region, key.NewNode()), testkit.RegionClient(t, u.region, key.NewNode())
	defer func() {
		cancel()
		_ = from.Close()
		_ = to.Close()
	}()

	got := make(chan uint64)
	running.Go(func() { listen(ctx, from, nil) })
	running.Go(func() { listen(ctx, to, got) })
	running.Go(func() {
		tick := time.NewTicker(sendEvery)
		defer tick.Stop()
		for number := uint64(0); ; number++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			// After an error the next Send dials, as a busy tailscaled does.
			_ = from.Send(to.SelfPublicKey(), binary.BigEndian.AppendUint64(nil, number))
		}
	})

	var last time.Time
	var longest time.Duration
	receive := func(packets int) {
		for range packets {
			select {
			case <-got:
			case <-ctx.Done():
				t.Fatalf("%s: packets did not arrive", u.name)
			}
			now := time.Now()
			if !last.IsZero() {
				longest = max(longest, now.Sub(last))
			}
			last = now
		}
	}
	receive(50)
	longest = 0
	u.images[0], u.images[1] = u.images[1], u.images[0]
	u.pushed[0], u.pushed[1] = u.pushed[1], u.pushed[0]
	u.move(t, u.tag, u.pushed[0])
	replaced := make(chan struct{})
	running.Go(func() {
		defer close(replaced)
		if updated, err := watchtower(t, u.name); !updated || err != nil {
			t.Errorf("%s: updated %t, error %v", u.name, updated, err)
		}
	})
	for waiting := true; waiting; {
		select {
		case <-replaced:
			waiting = false
		case <-ctx.Done():
			t.Fatalf("%s: container was not replaced", u.name)
		case <-got:
			now := time.Now()
			longest, last = max(longest, now.Sub(last)), now
		}
	}
	receive(50)
	if runs := docker(t, "inspect", "--format", "{{.Image}}", u.name); runs != u.images[0] {
		t.Fatalf("%s runs %s, want %s", u.name, runs, u.images[0])
	}
	u.outages = append(u.outages, longest.Round(time.Millisecond))
}

// listen receives as magicsock does, with its pauses between attempts to connect.
func listen(ctx context.Context, c *derphttp.Client, got chan<- uint64) {
	pause := backoff.NewBackoff("derp", logger.Discard, 5*time.Second)
	for ctx.Err() == nil {
		message, err := c.Recv()
		pause.BackOff(ctx, err)
		packet, ok := message.(derp.ReceivedPacket)
		if err != nil || !ok || got == nil || len(packet.Data) != 8 {
			continue
		}
		select {
		case got <- binary.BigEndian.Uint64(packet.Data):
		case <-ctx.Done():
		}
	}
}

// replace replaces a container as Watchtower 1.22 does (StopAndRemoveSourceContainer
// and StartTargetContainer in its pkg/container), in the same order: stop, remove,
// create, rename, start. The new container gets the settings of the old container. The
// defaults of the old image are left out, so that the new image's defaults apply.
func replace(t *testing.T, name string) {
	t.Helper()
	var old struct {
		ID, Name, Image string
		Config          map[string]any
		HostConfig      map[string]any
		NetworkSettings struct {
			Networks map[string]struct{ Aliases []string }
		}
	}
	engine(t, http.MethodGet, "/containers/"+name+"/json", nil, &old)
	var from struct{ Config map[string]any }
	engine(t, http.MethodGet, "/images/"+old.Image+"/json", nil, &from)

	config := old.Config
	for setting, value := range config {
		config[setting] = given(value, from.Config[setting])
	}
	networks := make(map[string]any)
	for network, endpoint := range old.NetworkSettings.Networks {
		// The engine adds the short ID to the aliases.
		aliases := slices.DeleteFunc(endpoint.Aliases, func(alias string) bool { return strings.HasPrefix(old.ID, alias) })
		networks[network] = map[string]any{"Aliases": aliases}
	}
	config["HostConfig"] = old.HostConfig
	config["NetworkingConfig"] = map[string]any{"EndpointsConfig": networks}
	timeout := config["StopTimeout"]
	if timeout == nil {
		t.Errorf("%s has no stop timeout", name)
		return
	}

	var created struct{ ID string }
	engine(t, http.MethodPost, fmt.Sprintf("/containers/%s/stop?t=%v", old.ID, timeout), nil, nil)
	engine(t, http.MethodDelete, "/containers/"+old.ID+"?force=1", nil, nil)
	engine(t, http.MethodPost, "/containers/create", config, &created)
	engine(t, http.MethodPost, "/containers/"+created.ID+"/rename?name="+url.QueryEscape(strings.TrimPrefix(old.Name, "/")), nil, nil)
	engine(t, http.MethodPost, "/containers/"+created.ID+"/start", nil, nil)
}

// given returns the part of a container's setting that its image did not set.
func given(value, image any) any {
	if reflect.DeepEqual(value, image) {
		return nil
	}
	switch value := value.(type) {
	case []any: // Env
		set, _ := image.([]any)
		return slices.DeleteFunc(value, func(v any) bool { return slices.Contains(set, v) })
	case map[string]any: // Labels, Volumes, ExposedPorts
		set, _ := image.(map[string]any)
		maps.DeleteFunc(value, func(name string, v any) bool { return reflect.DeepEqual(v, set[name]) })
	}
	return value
}

// engine sends a request to the Docker engine. All supported engines have API 1.41.
func engine(t *testing.T, method, path string, body, into any) {
	t.Helper()
	var content bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&content).Encode(body); err != nil {
			t.Error(err)
			return
		}
	}
	request, err := http.NewRequestWithContext(t.Context(), method, "http://docker/v1.41"+path, &content)
	if err != nil {
		t.Error(err)
		return
	}
	request.Header.Set("Content-Type", "application/json")
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", "/var/run/docker.sock")
	}}
	defer transport.CloseIdleConnections()
	answer, err := (&http.Client{Transport: transport, Timeout: dockerTimeout}).Do(request)
	if err != nil {
		t.Errorf("%s %s: %v", method, path, err)
		return
	}
	defer func() { _ = answer.Body.Close() }()
	text, err := io.ReadAll(answer.Body)
	// Stopping a stopped container is answered by 304.
	if err != nil || answer.StatusCode >= 400 {
		t.Errorf("%s %s: %s, %v: %s", method, path, answer.Status, err, text)
		return
	}
	if into != nil {
		if err := json.Unmarshal(text, into); err != nil {
			t.Errorf("%s %s: %v in %s", method, path, err, text)
		}
	}
}

// await waits until holds returns true. Docker takes longer than testkit's
// patience to update a container or to call it unhealthy.
func await(t *testing.T, what string, limit time.Duration, holds func() bool) {
	t.Helper()
	testkit.Within(t, limit, what, func(context.Context) error {
		if !holds() {
			return errors.New("not yet")
		}
		return nil
	})
}
