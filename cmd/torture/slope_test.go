//go:build linux

package main

import (
	"math"
	"testing"
	"time"
)

func TestSlope(t *testing.T) {
	at := func(second int, value float64) sampled { return sampled{time.Duration(second) * time.Second, value} }
	for _, tt := range []struct {
		name    string
		samples []sampled
		want    float64
	}{
		{"none", nil, 0},
		{"one", []sampled{at(5, 7)}, 0},
		{"one time", []sampled{at(5, 7), at(5, 9)}, 0},
		{"flat", []sampled{at(0, 7), at(30, 7), at(90, 7)}, 0},
		{"a line", []sampled{at(60, 10), at(90, 11), at(180, 14)}, 2},
		{"noise", []sampled{at(0, 1), at(0, -1), at(60, 4), at(60, 2)}, 3},
		{"down", []sampled{at(0, 3), at(120, 1)}, -1},
	} {
		if got := slope(tt.samples); math.Abs(got-tt.want) > 1e-9 {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
