package config

// elsewhere are variables of other images, and their names here.
var elsewhere = map[string]string{
	"DERP_HOSTNAME": "DERP_DOMAIN",
	"DERP_HOST":     "DERP_DOMAIN",
	"DERP_CERTS":    "DERP_CERT_DIR",
}

// suggestion names the known variable that is nearest to name, if one is near.
func suggestion(name string, known map[string]bool) string {
	if here, ok := elsewhere[name]; ok {
		return "; here it is " + here
	}
	const near = 3 // letters
	best, bestDistance := "", near+1
	for candidate := range known {
		for _, form := range []string{candidate, candidate + "_FILE"} {
			d := distance(name, form)
			if d < bestDistance || d == bestDistance && best != "" && form < best {
				best, bestDistance = form, d
			}
		}
	}
	if best == "" {
		return "; `derpd env` lists all variables"
	}
	return "; did you mean " + best + "?"
}

// distance is the number of letters to insert, delete or replace to get from a to
// b (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
